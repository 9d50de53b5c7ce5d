"""What a run leaves on the disk, and how it is taken up: its folder, whole files, checkpoints, curves."""
