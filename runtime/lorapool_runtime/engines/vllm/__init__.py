"""The engine on vLLM: its engine process, driven from this process through `AsyncLLM`.

Belongs here: what makes vLLM keep the promises of `engines.interface`. Only `names` imports vllm, and only `worker`
touches its private attributes, in vLLM's own process.
"""
