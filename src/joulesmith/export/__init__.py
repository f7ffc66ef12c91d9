"""Write a model in a format that an existing engine loads."""
