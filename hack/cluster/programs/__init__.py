"""The programs that a cluster runs and the machine must have: their versions, where they come from, how they are built."""
