"""Training: the demo's prior, cached features, the loop and its state, ablations."""
