"""The `operator/` trap and other rules of the house that only show when they are broken."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_PARENTS = ("crds", "operator", "runtime")
STDLIB_ALIKE = {"queue", "types", "select", "signal", "resource", "profile", "platform", "operator"}


def test_the_standard_library_operator_wins_with_the_root_as_working_directory() -> None:
    program = "import collections, operator; print(operator.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "operator")


@pytest.mark.parametrize("folder", PACKAGE_PARENTS)
def test_a_folder_that_only_holds_packages_is_no_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_tests_are_no_packages_and_their_file_names_are_unique() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    modules = [path.stem for folder in PACKAGE_PARENTS for path in (ROOT / folder).rglob("*.py")]
    assert STDLIB_ALIKE.isdisjoint(modules)


def test_every_module_says_why_it_exists() -> None:
    silent = []
    for folder in PACKAGE_PARENTS:
        for path in (ROOT / folder).rglob("*.py"):
            if not path.read_text().lstrip().startswith('"""'):
                silent.append(str(path.relative_to(ROOT)))
    assert silent == []


@pytest.mark.parametrize(
    "lock", [*ROOT.glob("requirements*.lock"), ROOT / "hack" / "bootstrap.lock"], ids=lambda p: p.name
)
def test_every_requirement_has_a_hash_and_no_lock_file_names_a_host(lock: Path) -> None:
    text = "\n".join(line for line in lock.read_text().splitlines() if not line.lstrip().startswith("#"))
    requirements = text.replace("\\\n", " ").splitlines()
    assert [line for line in requirements if line.strip() and "--hash=sha256:" not in line] == []
    assert "://" not in text
