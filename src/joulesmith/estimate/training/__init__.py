"""Hours, joules, carbon and money of training that has not begun."""
