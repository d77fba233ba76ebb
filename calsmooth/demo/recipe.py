"""How the built-in model is fine-tuned where the user says nothing: FinetuneConfig's keys."""

RECIPE = {
    "lr": 2e-3,  # half of the pre-training's peak: so small a model needs large steps
    "epochs": 5,
    "batch_size": 32,
    "max_length": 256,  # the longest row has less than half of it
}
