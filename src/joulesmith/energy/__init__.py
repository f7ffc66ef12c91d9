"""Joules: counters, the power model, windows, carbon and price. Knows no language models."""
