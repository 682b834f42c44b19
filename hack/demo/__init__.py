"""The demo: from an empty machine to fine-tunes that answer, on a real Kubernetes."""
