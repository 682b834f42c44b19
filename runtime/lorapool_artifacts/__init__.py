"""Artifacts of adapters and base models: sources are inspected, fetched, and cached in folders named by digest.

`inspect` reads headers and settings without downloading weights; `fetch` and `cache` store files on disk. Only
safetensors and JSON are ever read. This package imports neither torch nor Kubernetes.
"""
