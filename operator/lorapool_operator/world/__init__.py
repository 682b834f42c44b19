"""What the operator has observed: the caches of API objects, how events enter them, and the values given to a decision.

Belongs here: parsing of objects, profiles, derived facts of one observed object. Does not belong here: any choice of
what to do about them (`decisions`) and any call to the API server or a runtime (`effects`).
"""
