"""Training and testing any task: settings, the loop, checkpoints, logs and resume in one run folder."""
