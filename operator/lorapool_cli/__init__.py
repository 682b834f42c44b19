"""The `lorapool` command for people: `lorapool serve` and `lorapool inspect`. Each does its work in its own package."""
