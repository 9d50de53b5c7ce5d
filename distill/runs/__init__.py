"""Files of a run: its folder, atomic writes, checkpoints, metrics, and the rules for resuming it."""
