"""The operator: everything that turns Lorapool's objects into pods and truthful status.

Level-triggered: handlers only mark keys dirty, `observe` gathers what is seen, `plan_*` decides
without I/O, `apply` spends the plan. Never in a request's path; no finalizers.
"""
