"""The ledger: a process that collects the halves of every request, keeps them, sums them and answers for the bill.

It owns the database, the roll-ups, the reconciliation, prices and costs, the usage API, quotas and the console.
"""
