"""Comparison: tokenizers side by side on a sample of a corpus."""
