"""Fewer bits a weight: block grids, rounding, and the step that applies them."""
