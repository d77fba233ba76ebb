"""The loss's Triton kernels, behind `calsmooth.loss.fused`."""
