"""Weight quantizers side by side; see ``__main__``."""
