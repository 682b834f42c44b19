"""What the benchmark programs share: their places on disk, workloads and load generators, records and targets.

Belongs here: what several programs import. Does not belong here: a program, and what one engine is run by (`engines`).
"""
