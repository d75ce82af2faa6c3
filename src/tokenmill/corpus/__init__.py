"""The corpus: where documents are, which files count, how each format is read, and in what order."""
