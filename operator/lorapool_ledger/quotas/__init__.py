"""Rates and budgets: what is free of them, and the leases that gateways hold of it."""
