"""Shards: tokens to shard files and sidecars, and shards to `tokens.bin`."""
