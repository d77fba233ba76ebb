"""Held-out responses: their rows as units of work, and what the predictions of their tokens come to."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from calsmooth import metrics
from calsmooth.evaluate.config import ChoicesConfig
from calsmooth.evaluate.next_token import TokenPredictor
from calsmooth.evaluate.results import RESAMPLES, TaskResult, memory_note
from calsmooth.evaluate.tasks import RESPONSES
from calsmooth.evaluate.tasks.responses import ResponseRows
from calsmooth.evaluate.units import Record, Unit, parts
from calsmooth.models import check_vocabulary
from calsmooth.plots import prepare_reliability
from calsmooth.records import TokenPredictions

if TYPE_CHECKING:
    from calsmooth.data import Example


class Responses:
    """The rows of one data set, whose response tokens one model predicts."""

    name = RESPONSES

    def __init__(self, rows: ResponseRows, config: ChoicesConfig, predictor: TokenPredictor) -> None:
        self.rows, self.examples, self.config, self.predictor = rows, rows.examples, config, predictor

    def key(self) -> str:
        """What is predicted, in a few words and as a hash of every token and label."""
        digest = hashlib.sha256()
        for example in self.examples:
            for ids in (example.input_ids, example.labels):
                digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
        return f"{len(self.examples):,} rows, sha256 {digest.hexdigest()}"

    def units(self) -> list[Unit]:
        return [
            Unit(
                name=f"{self.name}/{number}",
                cost=sum(len(example.input_ids) for example in part),
                steps=len(part),
                score=partial(self._score, part),
            )
            for number, part in enumerate(parts(self.examples))
        ]

    def result(self, records: Sequence[Record]) -> TaskResult:
        """Metrics of all tokens; the records are those of `units()`, in that order."""
        statistics = np.concatenate([_decoded(record["statistics"]) for record in records])
        confidence, correct, nll, brier = statistics.T
        row = np.repeat(np.arange(len(self.examples)), [count for record in records for count in record["tokens"]])
        top = metrics.summarize_top(
            confidence,
            correct,
            bins=self.config.bins,
            resamples=RESAMPLES,
            seed=self.config.seed,
            clusters=row,  # the tokens of a response aren't independent
            losses={"brier": brier, "nll": nll},
        )
        panel = prepare_reliability(
            confidence, correct, bins=self.config.bins, title=self.name, ece_interval=top["ece_interval"]
        )
        summary = {
            **top,
            # Over a whole vocabulary there is no list of choices to be judged one by one.
            "sce": None,
            "ace": None,
            "choice_mass": None,
            "rows": len(self.examples),
            "template": self.rows.template,
            "source": self.rows.source,
            "key": self.key(),
            "reliability": panel.to_dict(),
        }
        notes = [*self.rows.notes, *memory_note(self.name, sum(record["halvings"] for record in records))]
        if self.predictor.readout.fallback is not None:
            notes.append(f"predictions are those of the model's own logits: {self.predictor.readout.fallback}")
        tokens = TokenPredictions(confidence, correct, nll, brier, row)
        return TaskResult(summary, panel, notes=notes, tokens=tokens)

    def _score(self, examples: Sequence["Example"], _: None, advance: Callable[..., None]) -> Record:
        highest = max(token for example in examples for token in example.input_ids)
        check_vocabulary(self.config.model, self.predictor.model.config, highest)
        halved = self.predictor.batches.halvings
        found = self.predictor.predict(examples, advance)
        statistics = np.stack([found.confidence, found.correct, found.nll, found.brier], axis=-1)
        return {
            "statistics": base64.b64encode(statistics.tobytes()).decode(),
            "tokens": np.bincount(found.row, minlength=len(examples)).tolist(),
            "halvings": self.predictor.batches.halvings - halved,
        }


def _decoded(text: str) -> np.ndarray:
    """(tokens, 4) float64."""
    return np.frombuffer(base64.b64decode(text), dtype=np.float64).reshape(-1, 4)
