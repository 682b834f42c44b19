"""The local cluster: a real one-node Kubernetes on a Linux machine without Docker, for the demo and the tests.

Run as `python3 hack/cluster COMMAND`. Standard library only: it runs before any virtual environment exists.
`programs` provides the programs, `plan` decides what runs (pure), `supervisor` runs it inside the cluster's
own namespaces, `lifecycle` starts and ends that supervisor, `cli` reads the command line.
"""
