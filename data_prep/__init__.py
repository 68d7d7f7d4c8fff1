"""Source archive → shards, sample index and manifest. No torch in here."""

__version__ = "0.1.0"
