"""Where images come from: files, folders, lists, archives, Parquet, URLs."""
