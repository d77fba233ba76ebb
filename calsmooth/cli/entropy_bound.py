"""`calsmooth entropy-bound`."""
