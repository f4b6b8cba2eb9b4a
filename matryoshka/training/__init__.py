"""A training run around its steps: options, state, checkpoints, signals, recovery."""
