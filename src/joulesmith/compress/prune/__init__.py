"""Pruning: weights, neurons, heads, layers."""
