"""Verification: every byte of a data root against its records and, on request, its corpus."""
