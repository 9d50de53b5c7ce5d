"""Training with Lightning: modules, optimizer, schedulers and DDP."""
