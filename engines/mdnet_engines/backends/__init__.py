"""Which backend runs which graph: candidates, trials, the choice, and its record."""
