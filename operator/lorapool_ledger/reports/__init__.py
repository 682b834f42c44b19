"""Read-only queries on the ledger's sums and facts, for the API, the console and the exports.

Every function takes a connection in a read-only transaction and a `Scope`, so that no caller sees the usage of others.
"""
