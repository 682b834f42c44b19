"""What requests and adapters have used: counted in memory, and recorded until the ledger has it.

Belongs here: the accounts of adapters and of the base, the journal of usage records, the table of running requests and
the use of each minute. Nothing here knows HTTP, adapters' weights or an engine.
"""
