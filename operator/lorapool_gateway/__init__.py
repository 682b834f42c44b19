"""The OpenAI front door: authenticates, finds the adapter, holds while cold, picks a replica, streams, meters."""
