"""Where do the examples' models come from? Trained here, in seconds, and signed."""
