"""What people look at: page, terminal, JSON."""
