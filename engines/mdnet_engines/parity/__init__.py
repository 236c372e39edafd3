"""Parity with PyTorch: gates, probes, metrics, and the report as JSON."""
