"""`calsmooth finetune`."""
