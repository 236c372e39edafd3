"""The command `mdnet-export`."""
