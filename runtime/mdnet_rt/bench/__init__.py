"""`mdnet-rt bench`: how fast a bundle is here, against others."""
