"""Decides which sequences compute how many tokens next, and which KV blocks they own.

Pure: no torch, no clock, no I/O. The memory of the blocks is in `model`.
"""
