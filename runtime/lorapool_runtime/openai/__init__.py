"""OpenAI JSON to token ids, and generated tokens back to OpenAI JSON.

Belongs here: parsing and validation of request bodies, chat templates, tools, grammars, detokenization, response
bodies. Knows no adapter, no HTTP server and no engine beyond the value types of `engines.interface`.
"""
