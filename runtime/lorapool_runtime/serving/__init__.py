"""A request on its way from HTTP to an engine and back.

Belongs here: the HTTP routes, admission, submission to the engine, and the HTTP response. OpenAI's JSON belongs to
`openai`, adapters to `adapters`; nothing here imports torch.
"""
