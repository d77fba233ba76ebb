"""metrics.jsonl: its lines are written and shown as they come, and summed up at the end."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calsmooth import console
from calsmooth.errors import CalsmoothError
from calsmooth.files import read_jsonl, write_json
from calsmooth.finetune.checkpoints import checkpoints
from calsmooth.finetune.meter import BadStepError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

METRICS = "metrics.jsonl"
BAD_STEP = "bad-step.json"

Record = Callable[[dict[str, Any]], None]


@contextmanager
def metrics_recorder(path: Path, done: int, steps: int, report: Record, writes: bool = True) -> Iterator[Record]:
    """Yields `record(values)`, which appends a line to the file, shows it and hands it to `report`.

    done: steps that were taken before. writes: whether this process does so at all.

    Raises:
        CalsmoothError: from `record`, if the line can't be written.
    """
    if not writes:
        yield lambda values: None
        return
    with (
        open(path, "a", encoding="utf-8") as lines,
        console.progress("fine-tuning", steps, note_below=True) as advance,
    ):
        advance(done)
        last = done

        def record(values: dict[str, Any]) -> None:
            nonlocal last
            try:
                lines.write(json.dumps(values) + "\n")
                lines.flush()
            except OSError as error:
                raise CalsmoothError(
                    f"step {values['step']}: {path} can't be written ({error.strerror}); make room and go on with "
                    "--resume: checkpoints are whole"
                ) from error
            report(values)
            if "eval_nll" in values:
                console.say(evaluation_line(values))
                return
            advance(values["step"] - last, note=training_note(values))
            last = values["step"]

        yield record


def training_note(values: dict[str, Any]) -> str:
    """What stands below the progress bar."""
    memory = values["peak_memory_bytes"]
    return (
        f"loss {values['loss']:.4f}   lr {values['lr']:.1e}   {values['tokens_per_second']:,.0f} target tokens/s"
        + (f"   memory {memory / 1e9:.1f} GB" if memory else "")
        + (f"   kept mass {values['kept_mass']:.4f}" if "kept_mass" in values else "")
    )


def evaluation_line(values: dict[str, Any]) -> str:
    return (
        f"step {values['step']:>5}: held-out NLL {values['eval_nll']:.4f}, ECE {values['eval_ece']:.4f}, "
        f"accuracy {values['eval_accuracy']:.3f}, logit distance {values['eval_logit_distance']:.2f}"
    )


def summarize_metrics(path: Path) -> dict[str, Any]:
    """tokens, first_loss, final_loss, and held_out: the evaluations before and after, if any."""
    lines = [values for _, values in read_jsonl(path)]
    training = [values for values in lines if "loss" in values]
    evaluations = [values for values in lines if "eval_nll" in values]
    tail = training[-max(1, len(training) // 10) :]
    summary: dict[str, Any] = {
        "tokens": training[-1]["tokens"],
        "first_loss": training[0]["loss"],
        "final_loss": sum(values["loss"] for values in tail) / len(tail),
    }
    if evaluations:
        summary["held_out"] = {"before": evaluations[0], "after": evaluations[-1]}
    return summary


def report_bad_step(error: BadStepError, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> str:
    """Write the step's rows into the run's folder; the one line that says what happened and what to do."""
    losses = [float(m.loss) for m in error.micro_batches]
    write_json(
        folder / BAD_STEP,
        {
            "step": error.step,
            "why": str(error),
            "micro_batches": [
                {
                    "loss": loss if math.isfinite(loss) else None,
                    "target_tokens": int((m.labels != -100).sum()),
                    "rows": tokenizer.batch_decode(m.input_ids),
                    "input_ids": m.input_ids.tolist(),
                }
                for m, loss in zip(error.micro_batches, losses, strict=True)
            ],
        },
    )
    bad = [str(i) for i, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    where = f", in micro-batch {', '.join(bad)} of {len(losses)}" if bad and len(losses) > 1 else ""
    whole = checkpoints(folder / "checkpoints")
    return (
        f"step {error.step}: {error}{where}; the step was not taken. Its rows are in {folder / BAD_STEP}, "
        + (f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet")
        + "; lower --lr, or look at those rows"
    )


def tensorboard(folder: Path, done: int) -> "TrainerCallback":
    """The callback that writes TensorBoard's files into the run's folder; steps after `done` are written anew."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None))
