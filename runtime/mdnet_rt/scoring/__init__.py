"""Images → scores: the pipeline, the scorer, and a run."""
