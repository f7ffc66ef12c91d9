"""Recovery, distillation and training from nothing, with joules counted. Knows no plans."""
