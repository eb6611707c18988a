"""Bundles of other trust domains, fetched and kept; and ours, served to them."""
