"""`calsmooth bench`."""
