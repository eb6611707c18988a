"""Whose signature counts, for what, and until when."""
