"""Views: which documents of which data roots, in which order, cut how. Tokens stay where they are."""
