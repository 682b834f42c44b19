"""Prints docstrings drawn at random from the product's code, for a reader to check: `--seed N --count 40`."""

import argparse
import ast
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("crds", "operator", "runtime")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}", text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    found = [one for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py")) for one in docstrings(path)]
    for place, text in random.Random(options.seed).sample(found, min(options.count, len(found))):
        print(f"{place}\n{textwrap.indent(text, '    ')}\n")


if __name__ == "__main__":
    main()
