"""The engine that owns torch: one thread, one base, one continuous batch of many adapters.

Belongs here: the step loop, sampling, and what binds scheduler, model and LoRA together. No HTTP, no OpenAI JSON,
no files of adapters (`weights` reads those).
"""
