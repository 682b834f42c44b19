"""One base model, many adapters, one continuous batch. Speaks torch and HTTP, never Kubernetes."""
