"""Fewer numbers a matrix: low-rank factors, what they lose, and the step that places them."""
