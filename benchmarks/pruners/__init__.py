"""Weight pruners side by side; see ``__main__``."""
