"""TensorRT: the scan's plugin, plans, and the session that runs them."""
