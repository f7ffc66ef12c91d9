"""Choose what to change: candidates, their damage, their joules, the solver."""
