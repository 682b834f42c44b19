"""The LoRA layer and the adapter slots.

Belongs here: where the matrices of each adapter are stored on the device, and the kernels that add them to rows. Does
not: which adapter gets which slot (`adapters` decides), and the base model.
"""
