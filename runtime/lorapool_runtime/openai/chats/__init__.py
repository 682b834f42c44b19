"""How a conversation becomes token ids: the tokenizer, chat templates and the processes that write them out.

What a template needs from an adapter's own files belongs here too. Reading a request's fields does not.
"""
