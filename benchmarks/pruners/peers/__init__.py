"""One module a pruner: `load`, `prune` (timed), `weights`, `forward`, `versions`."""
