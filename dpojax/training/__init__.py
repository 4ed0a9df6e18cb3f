"""From an objective to a trained policy: state, step, loop, reference, checkpoints, metrics."""
