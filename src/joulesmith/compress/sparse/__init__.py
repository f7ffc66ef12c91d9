"""Matrices with many zeros: where the others stand, and what they are, in few bits."""
