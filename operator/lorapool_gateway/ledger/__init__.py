"""The gateway's half of the ledger: a journal of attempts, which is sent to the ledger.

Nothing imports this package for its side effects.
"""
