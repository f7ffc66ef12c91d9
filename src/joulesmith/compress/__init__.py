"""Change a model: one folder a family."""
