"""What Lorapool's processes share: API objects, runtime protocol, error tree, placement, settings reader, log format.

This package imports nothing but pydantic and the standard library, so that each process can be built and tested
against it alone. `python -m lorapool_api` writes the CRDs' YAML.
"""
