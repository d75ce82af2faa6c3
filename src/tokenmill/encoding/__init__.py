"""Encoding: text to tokens, by the fast backend and by the reference that checks it."""
