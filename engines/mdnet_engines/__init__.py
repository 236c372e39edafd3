"""What runs a graph: the bundle and its manifest, sessions, and the SelectiveScan op."""
