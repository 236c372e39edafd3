"""The command `mdnet-rt`."""
