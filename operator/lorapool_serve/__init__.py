"""`make serve`: operator, gateway and runtimes on one machine, without Kubernetes and without root.

Only what replaces Kubernetes belongs here: objects in memory instead of an API server, a folder of YAML files instead
of kubectl, processes instead of pods. What an object means is decided by the operator's code, requests are served by
the gateway's, and the runtime is started as it is.
"""
