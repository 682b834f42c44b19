"""The structure of training data: JSON Lines of conversations or of prompts with completions, checked without a model.

The operator checks a file with this room before any pod starts, the trainer reads the same examples with it; tokens and
chat templates are the trainer's matter.
"""
