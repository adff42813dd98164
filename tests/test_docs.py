"""Every example of the guide and of the README runs, and every link in them leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#][^)]*)\)")
# Left to the reader: a model, and a folder with weights.
NOT_RUN = ("model(tokens)", "from_pretrained(folder")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_examples_run(page, capsys, monkeypatch):
    """The blocks of a page, one after the other, as a reader would type them."""
    blocks = [b for b in BLOCK.findall(page.read_text(encoding="utf-8")) if not any(n in b for n in NOT_RUN)]
    if any("transformers" in block for block in blocks) and not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # for compat.flash_attn.install()
    torch.manual_seed(0)
    names: dict = {}
    try:
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_public_name_is_in_the_reference():
    import flash_attn_ext as fae

    reference = (ROOT / "docs" / "guide" / "reference.md").read_text(encoding="utf-8")
    left_out = {"Attention", "MemoryEstimate", "nn"}  # what another entry returns or holds
    for name in set(fae.__all__) - left_out:
        assert f"flash_attn_ext.{name}" in reference, name


def test_the_site_lists_every_page():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "guide").glob("*.md"):
        assert f"guide/{page.name}" in site
