"""`import flash_attn` for models that insist on that package: this one's functions under its names."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterable
from pathlib import Path

_NAME = "flash_attn"


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` says of a package that has no files of its own."""

    def __init__(self, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename in ("METADATA", "PKG-INFO") else None

    def locate_file(self, path) -> Path:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    """Offers the distribution; the modules are in `sys.modules`, where import looks first."""

    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, fullname, path=None, target=None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = context.name if context else None
        if name is None or name.replace("-", "_").lower() == _NAME:
            return [_Distribution(self._version)]
        return []


def install() -> None:
    """Make `import flash_attn`, `flash_attn.flash_attn_interface`, `flash_attn.bert_padding` and
    `flash_attn.layers.rotary` find this package's functions, in this process, from now on. A flash_attn that
    is installed is left alone only where it has been imported before: then this raises.

    Raises:
        ImportError: another flash_attn has been imported already.

    Example:
        >>> flash_attn_ext.compat.flash_attn.install()
        >>> from flash_attn import flash_attn_func
    """
    from . import bert_padding, flash_attn, rotary

    present = sys.modules.get(_NAME)
    if present is not None:
        if getattr(present, "__flash_attn_ext__", False):
            return
        raise ImportError("flash_attn has been imported already; call install() before anything imports it")
    package = _module(_NAME, flash_attn, is_package=True)
    package.__version__ = flash_attn.__version__
    package.__flash_attn_ext__ = True
    package.flash_attn_interface = _module(f"{_NAME}.flash_attn_interface", flash_attn)
    package.bert_padding = _module(f"{_NAME}.bert_padding", bert_padding)
    layers = package.layers = types.ModuleType(f"{_NAME}.layers")
    layers.__path__ = []
    layers.rotary = _module(f"{_NAME}.layers.rotary", rotary)
    for module in (package, package.flash_attn_interface, package.bert_padding, layers, layers.rotary):
        sys.modules[module.__name__] = module
    sys.meta_path.insert(0, _Finder(flash_attn.__version__))


def _module(name: str, source: types.ModuleType, is_package: bool = False) -> types.ModuleType:
    """A module `name` with the functions of `source`."""
    module = types.ModuleType(name, source.__doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    names = [
        *source.__all__,
        *(n for n in vars(source) if n.startswith(("_flash_attn", "_get_block", "USE_"))),
    ]
    vars(module).update({n: getattr(source, n) for n in names if n != "install"})
    return module
