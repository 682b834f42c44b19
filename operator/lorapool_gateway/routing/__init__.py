"""What the gateway knows: objects and API keys as they are now, the runtimes' own reports, and which replica to prefer.

Everything here exists independently of any request; the tables are immutable and replaced whole. Code that handles one
request belongs in `requests`, which imports this package and is never imported by it.
"""
