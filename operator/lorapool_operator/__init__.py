"""Watches BaseModel and LoraAdapter objects, runs and scales bases, judges and places adapters, writes status."""
