"""The trainer as a server: the operator's protocol over HTTP, and jobs whose files are in the release's store.

The event loop answers HTTP; one thread of its own computes. What a job is and whose turn it is belongs to the root.
"""
