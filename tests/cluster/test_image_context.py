"""What the Dockerfile copies reaches the build, and a change of it makes a new image."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack"))

from images.build import FILES, FILES_OF_HACK, FILES_OF_VLLM, SOURCES  # noqa: E402


def copied() -> list[str]:
    """What the Dockerfile copies from the build context, as it names it."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.M)
    return sorted({name for line in lines for name in line.split()})


@pytest.mark.parametrize("name", copied())
def test_a_copied_file_is_in_the_context_and_in_the_images_key(name: str) -> None:
    assert (ROOT / name).exists()
    assert f"!{name}" in (ROOT / ".dockerignore").read_text().splitlines()
    known = (*SOURCES, *FILES, *FILES_OF_HACK, *FILES_OF_VLLM)
    assert name in known or re.fullmatch(r"requirements-[a-z-]+\.lock", name)
