"""Usage and costs as OpenAI's official client asks for them, and what the console shares with it."""
