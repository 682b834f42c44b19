"""Turns an adapter's files into one checked, packed buffer. No torch.

Belongs here: reading safetensors, matching tensors with the base's linear layers, the layout of the buffer. The slots
that use the buffer do not.
"""
