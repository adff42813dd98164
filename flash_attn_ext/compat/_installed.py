"""`import flash_attn` for models that insist on that package: this one's functions under its names."""

from __future__ import annotations

import importlib
import importlib.abc
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
        metadata = f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {version}\n"
        # By top_level.txt importlib.metadata.packages_distributions tells whose package it is.
        self._texts = {"METADATA": metadata, "PKG-INFO": metadata, "top_level.txt": f"{_NAME}\n"}

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path) -> Path:
        return Path(__file__).parent / path


class _Loader(importlib.abc.Loader):
    """Fills a module with the functions of `source`."""

    def __init__(self, source: types.ModuleType | None) -> None:
        self._source = source

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None  # an ordinary one

    def exec_module(self, module: types.ModuleType) -> None:
        source = self._source
        if source is None:
            return
        private = (n for n in vars(source) if n.startswith(("_flash_attn", "_get_block", "USE_")))
        names = [n for n in (*source.__all__, *private) if n != "install"]
        vars(module).update({n: getattr(source, n) for n in names}, __doc__=source.__doc__)
        if module.__name__ == _NAME:
            module.__version__ = source.__version__
            module.__flash_attn_ext__ = True


class _Finder(importlib.metadata.DistributionFinder):
    """Offers the modules and the distribution. `sources`: what has the functions of each module, if any."""

    def __init__(self, version: str, sources: dict[str, types.ModuleType | None]) -> None:
        self._version = version
        self._sources = sources

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._sources:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self._sources)
        loader = _Loader(self._sources[fullname])
        return importlib.machinery.ModuleSpec(fullname, loader, origin=__file__, is_package=is_package)

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
    sources = {
        _NAME: flash_attn,
        f"{_NAME}.flash_attn_interface": flash_attn,
        f"{_NAME}.bert_padding": bert_padding,
        f"{_NAME}.layers": None,
        f"{_NAME}.layers.rotary": rotary,
    }
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(flash_attn.__version__, sources))
    for name in sources:
        importlib.import_module(name)
