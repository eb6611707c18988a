"""From a registry's bytes to weights: read once, hashed in place, then reachable."""
