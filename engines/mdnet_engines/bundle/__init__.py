"""The bundle: its manifest, and how its files are read and written."""
