"""Calls to the API server, to runtimes and to adapter sources, with what has to be remembered of them.

Belongs here: the application of plans, the Lease, long-polls, inspections. Does not belong here: the choice of what
to call and when, which is in `decisions`.
"""
