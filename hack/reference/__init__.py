"""Writes docs/reference/ from the code: `python hack/reference [--check]`."""
