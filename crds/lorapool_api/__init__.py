"""The contract between Lorapool's parts: objects, wire protocol, error tree, placement.

Everything here is pure and imports nothing but pydantic, so that each part can be built,
tested and replaced against it alone. `python -m lorapool_api` writes the CRD YAML.
"""
