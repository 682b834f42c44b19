"""The engine on torch: one thread, one base, one continuous batch of many adapters.

Belongs here: the step loop, sampling, and the code that connects scheduler, model and LoRA. Does not: HTTP, OpenAI
JSON, and the files of adapters, which `weights` reads.
"""
