"""Shards → batches: order, crops, and loaders behind one interface."""
