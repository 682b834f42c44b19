"""Data sets as token ids: examples are rendered and tokenized exactly as serving does, with a mask of what is learned.

Structure is checked by `lorapool_artifacts.datasets`; this room adds the base's tokenizer and template. No torch.
"""
