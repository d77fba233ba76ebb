"""The example's recipe is the built-in one, as it says."""

from pathlib import Path

from calsmooth.config import load
from calsmooth.finetune.config import FinetuneConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "demo"


def test_the_recipe_in_the_example_is_the_default():
    assert load(FinetuneConfig, {}, EXAMPLES / "finetune.yaml").resolve() == FinetuneConfig().resolve()
