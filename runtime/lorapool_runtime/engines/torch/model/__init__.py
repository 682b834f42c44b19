"""The base model loaded by transformers and adapted for shared use: paged attention, KV pool, native replacements.

The only room that knows transformers' structural names. LoRA is added by `lora`.
"""
