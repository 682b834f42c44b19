"""The programs of a cluster and of the machine: their versions, where they come from, how they are built."""
