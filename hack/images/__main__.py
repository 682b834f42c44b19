"""Lets `python3 hack/images` and `python3 -m images` be the same program."""

import sys
from pathlib import Path

if not __package__:  # run by path: make the folder importable as the package it is
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from images.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
