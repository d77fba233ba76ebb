"""`calsmooth calibrate`."""
