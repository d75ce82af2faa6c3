"""Transfer: files of a data root to and from buckets, resumable and checked."""
