"""Scores against ratings: the benchmark's protocols, published results, the report."""
