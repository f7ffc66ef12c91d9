"""Energy of training or serving a model of any size, before anything runs."""
