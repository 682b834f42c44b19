"""How facts get into the ledger: batches that gateways send, and records that are pulled from runtimes.

Facts and the cursor of their writer are committed in one transaction. What was committed is acknowledged afterwards, so
that a crash at any moment leads to a second delivery at most, which the cursor makes harmless.
"""
