"""Time, memory and accuracy of the label-smoothed linear cross-entropy, ours and everybody else's, on one machine."""
