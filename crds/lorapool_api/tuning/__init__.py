"""Fine-tuning in the contract: the FineTuneJob object, its reasons, and the protocol between operator and trainer.

What serving needs belongs to the package's root. What a base says about fine-tuning is in `basemodel`.
"""
