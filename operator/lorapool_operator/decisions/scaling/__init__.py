"""How many replicas a base has, and which. Pure, like all decisions.

Belongs here: the number of replicas by load, attempts to start, which pods stop, which base yields its devices,
roll-outs and what their pods load first. Does not belong here: the manifests of the pods, and where adapters are
loaded.
"""
