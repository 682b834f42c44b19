"""What is to be done about one object. Pure: the same observation, time and settings give the same plan.

Belongs here: plans, scaling, status conditions, manifests of children. Does not belong here: clocks, I/O, asyncio,
Kubernetes clients; `effects` carries a plan out.
"""
