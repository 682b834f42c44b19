"""One job: its settings as numbers, when it is evaluated and ends, and the files that it leaves.

Decisions here are pure, and files are written whole or not at all; which job computes when is decided in the root.
"""
