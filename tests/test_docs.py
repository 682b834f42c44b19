"""The pages name only what is there: make targets, files, links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "hack").rglob("README.md")]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_a_page_names_exists(page: Path) -> None:
    named = set()
    for command in re.findall(r"(?:^|`)make ([a-z][a-z -]*[a-z])", page.read_text(), re.M):
        named |= {word for word in command.split() if not word.startswith("-")}
    assert named - TARGETS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_no_placeholder_is_left_in_a_page() -> None:
    assert [str(page) for page in PAGES if re.search(r"@[A-Z]{4,}@", page.read_text())] == []
