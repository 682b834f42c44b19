"""A request on its way from HTTP to an engine and back.

Belongs here: the HTTP routes, admission, and the translation of an admitted request into engine requests. OpenAI's
JSON is `openai`'s, adapters are `adapters`', and nothing here imports torch.
"""
