"""The command `mdnet`."""
