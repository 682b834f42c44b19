"""What is to be done about the FineTuneJobs of a base and about its trainer. Pure, like all decisions.

Belongs here: which jobs train, when a trainer's pod starts and ends, the gate, the status of jobs. Does not belong
here: anything that serving decides.
"""
