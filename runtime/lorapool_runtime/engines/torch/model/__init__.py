"""The base model, loaded by transformers and adapted for shared use: paged attention, KV pool, native replacements.

The only package that knows the structural names of transformers. LoRA is in `lora`, scheduling in `scheduling`.
"""
