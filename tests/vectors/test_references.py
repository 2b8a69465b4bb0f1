"""What the documents name exists: files that they link to, functions and constants of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = ("pool", "nbd_server", "backends", "stripewell")
FOLDERS = (*PACKAGES, "docs", "tests", "bench", "tools", "decisions", "format")
SUFFIXES = ("py", "md", "json", "toml", "img", "xz")


def module(parts: list[str]) -> Path | None:
    """The file of a dotted module name; names without a package are modules of the pool."""
    full = parts if parts[0] in PACKAGES else ["pool", *parts]
    path = ROOT.joinpath(*full).with_suffix(".py")
    return path if path.is_file() else None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_names_of_the_code_exist(document: Path) -> None:
    """`module.name` in a document is defined in that module."""
    wrong = []
    for text in re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", document.read_text()):
        *parts, name = text.split(".")
        path = module(parts)
        if name in SUFFIXES or path is None:
            continue
        pattern = rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*(?:self\.)?{name}(?::| =)"
        if not re.search(pattern, path.read_text(), re.MULTILINE):
            wrong.append(text)
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_are_named_exist(document: Path) -> None:
    """Links, and paths in code font that begin with a folder of the repository."""
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#:\s]+)[^)]*\)", text) if ":" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    for path in re.findall(r"`((?:[a-z_]+/)+[A-Za-z0-9_.-]*)`", text):
        places = (ROOT / path, ROOT / "docs" / path, ROOT / "pool" / path)
        if path.split("/")[0] in FOLDERS and not any(place.exists() for place in places):
            missing.append(path)
    assert missing == []


def test_sections_that_the_code_cites_exist() -> None:
    """A docstring that sends a reader to a section finds it."""
    cited = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for name, section in re.findall(
                r'`docs/(\w+\.md)`, "([^"]+)"', " ".join(path.read_text().split())
            ):
                headings = (ROOT / "docs" / name).read_text().splitlines()
                cited.append(section)
                assert any(h.lstrip("#") == f" {section}" for h in headings), (path, section)
    assert cited
