"""Everything around a training step: options, state, checkpoints, signals, recovery."""
