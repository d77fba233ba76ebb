"""Next-token calibration on held-out responses: was the most probable token the one that came, and how sure was it?

Not a list of questions: every response token of a row is one prediction over the whole vocabulary. The rows are what
`finetune` reads (same formats, same templates, loss on the response only), so that a model is judged on the kind of
text that it was trained to write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calsmooth.errors import UsageError
from calsmooth.files import read_json
from calsmooth.models import BUILT_IN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calsmooth.data import Example

NAME = "responses"


@dataclass(frozen=True)
class ResponseRows:
    """The tokenised rows, where they came from, and the template that made text of them ('none': they were text).

    notes: how the template was chosen, and what was left out or cut.
    """

    examples: Sequence["Example"]
    source: str
    template: str
    notes: list[str]


def load_responses(
    dataset: str | None,
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str | None,
    template: str | None,
    max_length: int,
    limit: int | None,
    seed: int,
) -> ResponseRows:
    """The rows of `dataset`, or for the built-in model those of its own held-out file.

    template: see `calsmooth.data.templates`; None for the one that the model was trained with, where it lies in the
    folder of a finetune run, else 'auto'.

    Raises:
        UsageError: no data set was given and the model isn't the built-in one, or the template can't be had.
        CalsmoothError: the rows can't be read.
    """
    from calsmooth.data.examples import load_example_set
    from calsmooth.demo import HELDOUT_FILE

    if dataset is None and model != BUILT_IN:
        raise UsageError("--task responses: needs --dataset, a file or hub id of held-out instruction data")
    source = dataset if dataset is not None else str(HELDOUT_FILE)
    run, trained_with = _training(model) if template is None else (None, None)
    rows = load_example_set(
        source,
        tokenizer,
        template=template or trained_with or "auto",
        split=split,
        max_length=max_length,
        limit=limit,
        seed=seed,
    )
    notes = [f"{NAME}: {_about_template(rows.template, template, run, tokenizer)}"]
    of = f"of {rows.rows:,} rows"
    if rows.dropped:
        notes.append(f"{NAME}: {rows.dropped:,} {of} were left out, whose response lies past {max_length:,} tokens")
    if rows.truncated:
        notes.append(f"{NAME}: {rows.truncated:,} {of} were read only to their first {max_length:,} tokens")
    return ResponseRows(rows.examples, source if dataset is not None else "built in", rows.template, notes)


def _training(model: str) -> tuple[Path | None, str | None]:
    """The finetune run in whose folder a model lies, and the template that it trained with; or None twice."""
    folder = Path(model).expanduser()
    run = folder.resolve().parent
    if (
        model == BUILT_IN
        or not folder.is_dir()
        or not all((run / f).is_file() for f in ("config.yaml", "summary.json"))
    ):
        return None, None
    summary = read_json(run / "summary.json")
    template = summary.get("template") if isinstance(summary, dict) else None
    return (folder.parent, template) if template in ("chat", "alpaca", "tulu") else (None, None)


def _about_template(used: str, given: str | None, run: Path | None, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Which template made text of the rows, and why that one. given: by --template. run: that says it otherwise."""
    if used == "none":
        return "the rows are text already, no template is used"
    if run is not None:
        return f"asked with the template {used}, which {run} was trained with"
    if given not in (None, "auto"):
        return f"asked with the template {used}, as --template says"
    if used == "chat":
        return "asked with the model's own chat template"
    if getattr(tokenizer, "chat_template", None):
        return f"asked with the template {used}, which the model carries"
    return f"asked with the template {used}, for the model has no chat template"
