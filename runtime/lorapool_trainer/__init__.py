"""The trainer: one process that trains many fine-tuning jobs together on one frozen base.

It knows files, tokens and steps, but no Kubernetes: an operator or a person at a laptop hands it jobs.
"""
