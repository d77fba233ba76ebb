"""Next-token calibration on held-out responses: was the most probable token the one that came, and how sure was it?

Not a list of questions: every response token of a row is one prediction over the whole vocabulary. The rows are what
`finetune` reads (same formats, same templates, loss on the response only), so that a model is judged on the kind of
text that it was trained to write.
"""

from typing import TYPE_CHECKING

from calsmooth.errors import UsageError
from calsmooth.models import BUILT_IN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calsmooth.data import Example

NAME = "responses"


def load_responses(
    dataset: str | None,
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str | None,
    max_length: int,
    limit: int | None,
    seed: int,
) -> tuple[list["Example"], str]:
    """(tokenised rows, where they came from): `dataset`, or for the built-in model its own held-out file.

    Raises:
        UsageError: no data set was given and the model isn't the built-in one.
        CalsmoothError: the rows can't be read.
    """
    from calsmooth.data import load_examples
    from calsmooth.demo import HELDOUT_FILE

    if dataset is None and model != BUILT_IN:
        raise UsageError("--task responses: needs --dataset, a file or hub id of held-out instruction data")
    source = dataset if dataset is not None else str(HELDOUT_FILE)
    examples = load_examples(source, tokenizer, split=split, max_length=max_length, limit=limit, seed=seed)
    return examples, source if dataset is not None else "built in"
