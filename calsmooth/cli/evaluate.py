"""`calsmooth evaluate`."""
