"""From an adapter's files to one checked, packed buffer. No torch.

Belongs here: reading safetensors, matching tensors with the base's linear layers, the buffer's layout. It does not
know where the buffer goes.
"""
