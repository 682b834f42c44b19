"""Decides from an adapter's settings and header whether it fits its base, and which remedy a refusal names.

Modules here read no file and open no connection; `inspect` and `examine` do that for them.
"""
