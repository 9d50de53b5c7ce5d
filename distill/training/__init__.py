"""Training with Lightning: the modules, and what optimizer, schedulers and ranks need."""
