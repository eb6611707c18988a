"""Where models come from: read only, and not trusted."""
