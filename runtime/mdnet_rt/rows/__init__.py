"""Where results go: CSV, JSON Lines, Parquet, tables, the gallery page."""
