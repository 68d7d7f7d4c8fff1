"""Checkpoint + shards → figures, plots and a report."""
