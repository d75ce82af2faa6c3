"""Interchange: data sets in the formats of trainers, out and in."""
