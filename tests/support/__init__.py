"""What several test files share: servers, clusters, runs, the slow way."""
