"""A workdir: its config, data, log, results and best checkpoint."""
