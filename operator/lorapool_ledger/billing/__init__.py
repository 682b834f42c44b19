"""Pure rules of the bill: what an attempt came to, what of it is billed, and what it costs."""
