"""The `lorapool` command for people: `lorapool serve`, `lorapool inspect` and `lorapool usage`."""
