"""Serves one base model and many adapters in one continuous batch. Knows torch and HTTP, not Kubernetes."""
