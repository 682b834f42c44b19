"""Which adapters are registered, where their weights are, and when they are loaded and unloaded.

Belongs here: the registry, the slot table, the host and disk caches, loading. Engines are reached through
`engines.interface` only; file formats are `weights`' business.
"""
