"""How the parts prove to each other who they are: tokens, certificates, challenges and owner chains of pods.

What a tenant may do does not belong here; it stands in the models of the objects.
"""
