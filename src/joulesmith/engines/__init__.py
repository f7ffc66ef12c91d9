"""Run a model file: one file an engine."""
