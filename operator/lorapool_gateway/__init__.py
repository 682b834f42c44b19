"""The OpenAI API in front of all runtimes: authenticates, finds the adapter, picks a replica, streams, counts tokens.

The root contains the life of the process and its HTTP surface. What the gateway knows is in `routing`, the handling of
one request in `requests`. Nothing here imports torch, and no request waits for the API server.
"""
