"""Remote: HTTP, S3 and the hub, with retries, limits of time, certificates and ETags."""
