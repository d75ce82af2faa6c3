"""Reporting: a data set on one page that a browser opens from disk."""
