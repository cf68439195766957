"""Sequential operations: for each a plain reference loop, and fast paths that are tested against it."""
