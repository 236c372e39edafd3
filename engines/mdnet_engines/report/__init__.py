"""HTML report pages: frame, charts, numbers, thumbnails."""
