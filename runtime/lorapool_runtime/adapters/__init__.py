"""Which adapters are registered, where their copies are stored, and when they are loaded and unloaded.

Belongs here: the registry, the slot table, the host cache and disk store, loading. Engines are reached through
`engines.interface` only; file formats belong to `weights`.
"""
