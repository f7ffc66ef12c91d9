"""Readers of model files' headers: what is stored where. None reads weights, runs code,
unpacks archives or imports torch; every size is checked against the file before use."""
