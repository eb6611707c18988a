"""Who is refused although their SVID still verifies."""
