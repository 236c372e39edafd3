"""`mdnet-rt serve`: scores over HTTP."""
