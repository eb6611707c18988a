"""The development authority: its keys, their rotation, and what they sign."""
