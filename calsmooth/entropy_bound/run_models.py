"""From models and a text to what section 4 says of their heads: measure, report, picture, files."""

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calsmooth import console
from calsmooth.data import Example, load_examples
from calsmooth.demo import HELDOUT_FILE
from calsmooth.entropy_bound.advice import Calibration, advise, calibration
from calsmooth.entropy_bound.bound import log_entropy_bound, max_probability, normalized_entropy_gap
from calsmooth.entropy_bound.config import EntropyBoundConfig
from calsmooth.entropy_bound.measure import Measurement, measure
from calsmooth.entropy_bound.plot_models import plot_models
from calsmooth.entropy_bound.texts import BUILT_IN_TEXT, read_text, take_tokens, text_examples
from calsmooth.files import check_run_folder, run_folder, write_json, write_text
from calsmooth.models import (
    BUILT_IN,
    check_vocabulary,
    load_model,
    load_tokenizer,
    model_label,
    pick_device,
    pick_dtype,
)
from calsmooth.plots import save_figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = {"min": 0.0, "q01": 0.01, "q10": 0.1, "median": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class MeasuredModel:
    """A model's name for tables, its measurement, and the report made of it (`report`)."""

    label: str
    measurement: Measurement
    calibration: Calibration
    report: dict[str, Any]


def run(config: EntropyBoundConfig) -> tuple[list[MeasuredModel], list[Path]]:
    """Measure every --model, one after the other, and write heads.json, .csv and the figure.

    Raises:
        UsageError, CalsmoothError: a model, the text or the output folder can't be used.
    """
    assert config.model
    device = pick_device(config.device)
    dataset = config.dataset
    if dataset is None and config.text is None and BUILT_IN in config.model:
        dataset = str(HELDOUT_FILE)  # the built-in model's world is not ours: of our text it knows nothing
    text = None if dataset else read_text(config.text or BUILT_IN_TEXT, config.max_tokens)
    if config.output is not None:
        check_run_folder(config.output)
    measured = []
    for name, label in zip(config.model, _labels(config.model), strict=True):
        started = time.perf_counter()
        tokenizer = load_tokenizer(name, config.revision)
        dtype = pick_dtype(config.dtype, device)
        model = load_model(name, dtype=dtype, device=device, revision=config.revision)
        room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        examples = _examples(
            text, dataset, tokenizer, min(config.max_length, room or config.max_length), config.max_tokens
        )
        check_vocabulary(name, model.config, max((max(e.input_ids) for e in examples), default=0))
        with console.progress(label, sum(example.target_tokens for example in examples)) as advance:
            m = measure(model, examples, advance=advance)
        del model  # before the next one is loaded
        c = calibration(m, config.bins)
        on = str(config.text or "built in") if dataset is None else dataset
        what = {"model": name, "text": on, "dtype": str(dtype).removeprefix("torch.")}
        measured.append(MeasuredModel(label, m, c, {**what, **report(m, c, config.beta)}))
        console.say(f"{label}: {len(m.tokens):,} predictions in {time.perf_counter() - started:.1f} s")
    figure = plot_models([(one.label, one.measurement, one.calibration) for one in measured], config.beta, config.bins)
    folder = run_folder(config.output, f"entropy-bound-{measured[0].label.replace('/', '-')}")
    files = [
        write_json(folder / "heads.json", [one.report for one in measured]),
        write_text(folder / "heads.csv", _csv([one.report for one in measured])),
        *save_figure(figure, folder / "heads"),
    ]
    return measured, files


def report(m: Measurement, c: Calibration, betas: tuple[float, ...]) -> dict[str, Any]:
    """Everything measured, as plain values for JSON; entropies in nats.

    The first keys are those of a point of the size mode. `entropy_lower_bound` is Theorem 4.2 with sigma_C and
    sigma_h; `floors` has the tighter ones: with the head's mean taken off, and for each token with its own ||h||.
    Floors that underflow are told by their `log10`.
    """
    reach, tokens = m.reach, m.tokens
    sigma_h = float(tokens.largest.max())
    longest = float(np.sqrt(reach.hidden) * sigma_h)
    radius = float(reach.radius(longest))
    rho = radius / float(np.sqrt(reach.hidden))
    floor = float(reach.floor(longest))
    token_floors = np.maximum(reach.floor(tokens.norm), reach.floor(tokens.norm, centred=True))
    token_radius = np.minimum(reach.radius(tokens.norm), reach.radius(tokens.norm, centred=True))
    attained = float(m.peaks.entropy.min())
    return {
        "vocab": reach.vocab,
        "hidden": reach.hidden,
        "rho": rho,
        "radius": radius,
        "entropy_lower_bound": floor,
        "entropy_lower_bound_log10": _log10_bound(reach.vocab, radius),
        "entropy_upper_bound": float(np.log(reach.vocab)),
        "normalized_gap": float(normalized_entropy_gap(reach.vocab, 1, radius)),
        "max_probability": float(max_probability(reach.vocab, 1, radius)),
        "head": {
            "sigma_c": reach.sigma_c.value,
            "sigma_c_residual": reach.sigma_c.residual,
            "sigma_c_centred": reach.sigma_c_centred.value,
            "bias_norm": reach.bias_norm,
            "logit_scale": reach.scale,
            "softcap": reach.softcap,
        },
        "hidden_states": {
            "sigma_h": sigma_h,
            "sigma_h_q99": float(np.quantile(tokens.largest, 0.99)),
            "norm": _quantiles(tokens.norm),
        },
        "floors": {
            "centred": float(reach.floor(longest, centred=True)),
            "centred_log10": _log10_bound(reach.vocab, float(reach.radius(longest, centred=True))),
            "token": _quantiles(token_floors),
            "token_median_log10": _log10_bound(reach.vocab, float(np.median(token_radius))),
        },
        "entropy": {**_quantiles(tokens.entropy), "mean": float(tokens.entropy.mean())},
        "attained": {
            "entropy": attained,
            "probability": float(m.peaks.probability.max()),
            "share_above_99_percent": float((m.peaks.probability > 0.99).mean()),
            "probed": len(m.peaks.token),
        },
        "looseness": {
            "text_minimum": float(tokens.entropy.min()) - floor,
            "token_mean": float((tokens.entropy - token_floors).mean()),
            "head_at_most": attained - float(reach.floor(float(np.median(tokens.norm)))),
        },
        "diversity": {
            "tokens": m.diversity.tokens,
            "features": m.diversity.features,
            "constant_features": m.diversity.constant,
            "smallest_singular_value": m.diversity.smallest,
            "smallest_if_independent": m.diversity.independent_smallest,
            "lemma_3_1_term": m.diversity.features / m.diversity.smallest if m.diversity.smallest else None,
            "effective_rank": m.diversity.effective_rank,
        },
        "calibration": asdict(c),
        "smoothing": [asdict(advise(m, beta, c)) for beta in betas],
    }


def _examples(
    text: str | None, dataset: str | None, tokenizer: "PreTrainedTokenizerBase", max_length: int, max_tokens: int
) -> list[Example]:
    if text is not None:
        return take_tokens(text_examples(text, tokenizer, max_length), max_tokens)
    assert dataset
    # Enough rows, if their responses have sixteen tokens: there is no need to render a whole large data set.
    rows = max(max_tokens // 16, 64)
    return take_tokens(load_examples(dataset, tokenizer, max_length=max_length, limit=rows), max_tokens)


def _labels(names: tuple[str, ...]) -> list[str]:
    """Short names; where two would be the same (checkpoints of two runs), with the folder above."""
    short = [model_label(name) for name in names]
    return [
        label if short.count(label) == 1 else "/".join(Path(name).expanduser().parts[-2:])
        for name, label in zip(names, short, strict=True)
    ]


def _log10_bound(vocab: int, radius: float) -> float:
    return float(log_entropy_bound(vocab, 1, radius) / np.log(10))


def _quantiles(values: Any) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()))
    return dict(zip(QUANTILES, map(float, found), strict=True))


def _csv(reports: list[dict[str, Any]]) -> str:
    """One line a model; nested keys joined by dots, smoothing weights by their value."""
    rows = [dict(_flat(one)) for one in reports]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Any:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        elif isinstance(inner, list):
            for one in inner:
                yield from _flat(one, f"{prefix}{key}.{one['beta']:g}.")
        else:
            yield prefix + key, inner
