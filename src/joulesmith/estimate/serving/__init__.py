"""Joules of serving a model on devices that need not be here."""
