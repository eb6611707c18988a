"""What else decides what runs: measured on this node, and held against its bundle."""
