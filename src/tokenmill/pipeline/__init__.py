"""The pipeline: one run from a corpus to shards, on threads or on a cluster."""
