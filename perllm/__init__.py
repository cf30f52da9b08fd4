"""PerLLM: a queue for LLM work with deadlines."""
