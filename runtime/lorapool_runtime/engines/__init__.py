"""The seam between serving and computation: the `Engine` protocol, its values, and one subpackage per engine.

`interface` imports neither torch nor vLLM. Everything outside this package uses the protocol, never an engine's
modules.
"""
