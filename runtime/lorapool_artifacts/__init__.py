"""Where adapters and bases come from: a source becomes a folder named by its digest.

Called by the operator (`inspect`: judged from headers, nothing downloaded) and by the runtime
(`fetch`, `cache`, `inspect`). Only safetensors and JSON are ever read; no torch, no Kubernetes.
"""
