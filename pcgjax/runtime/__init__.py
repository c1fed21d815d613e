"""What knows nothing of hearts: files, devices, processes, checkpoints, compiled programs."""
