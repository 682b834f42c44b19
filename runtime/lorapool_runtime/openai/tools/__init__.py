"""Tools and structured output: JSON schemas, the grammars made of them, and the formats in which models call tools."""
