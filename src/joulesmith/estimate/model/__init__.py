"""A language model, counted: read from what describes it, and what it has to do."""
