"""The data root: names and layouts of its files, its records, and how they are written durably."""
