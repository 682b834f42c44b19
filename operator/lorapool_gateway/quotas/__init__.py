"""Rates and budgets of keys, namespaces and models: admits requests with what the ledger leases to this gateway."""
