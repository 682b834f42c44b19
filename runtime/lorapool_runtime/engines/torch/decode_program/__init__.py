"""The CPU decode step as one native call: traced from the fitted model, verified, then replayed.

Frozen: no further features. The torch code path is the fallback for whatever cannot be traced.
"""
