"""Builds the project's images without Docker and pushes them to a local cluster's registry.

Run as `python3 hack/images COMMAND`. Standard library only; buildah and mmdebstrap do the work.
"""
