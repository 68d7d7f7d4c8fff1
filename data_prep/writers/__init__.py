"""Writers of shard formats."""
