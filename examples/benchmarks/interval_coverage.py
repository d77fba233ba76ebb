"""How often the 95 % intervals of ECE, and of differences of ECE, hold the true value: simulated, before and after.

    python examples/benchmarks/interval_coverage.py --repetitions 300 --questions 500

prints the tables of docs/intervals.md. Models whose true calibration error is known answer the same number of questions
again and again; a right interval holds that error in 95 % of the repetitions, wherever it lies. "bootstrap" is the
percentile bootstrap of ECE, the usual choice; "shifted" the same moved down by twice its bias and cut at 0; "calsmooth"
what results.json and comparison.json have.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from calsmooth import metrics

Array = np.ndarray
TRUTH = 2_000_000
"""Questions from which a generator's true ECE is known to three digits."""
METHODS = ("bootstrap", "shifted", "calsmooth")


@dataclass(frozen=True)
class Model:
    """States softmax(sharpen * (logits + noise * N(0, 1))), where softmax(logits) are the true probabilities.

    sharpen 1 without noise is calibrated, above it over-confident, below it under-confident.
    """

    sharpen: float
    noise: float = 0.0

    def answer(self, logits: Array, labels: Array, generator: np.random.Generator) -> tuple[Array, Array]:
        own = logits + self.noise * generator.normal(size=logits.shape)
        return metrics.top_choice(np.exp(metrics.log_softmax(own * self.sharpen)), labels)


@dataclass(frozen=True)
class World:
    """Questions of four choices with normal logits; `spread` 0.1 leaves little to know. With `tokens` above 1 they
    come in responses of that length whose true logits have a part in common (`shared`, its standard deviation)."""

    spread: float = 1.5
    tokens: int = 1
    shared: float = 0.0

    def questions(self, n: int, generator: np.random.Generator) -> tuple[Array, Array, Array | None]:
        """(logits that the models know (n, 4), labels (n,), names of their responses (n,))."""
        logits = generator.normal(size=(n, 4)) * self.spread
        responses = np.arange(n) // self.tokens
        # What a response's tokens have in common, and no model knows: how far the truth is from the logits.
        temper = np.exp(self.shared * generator.normal(size=responses[-1] + 1))[responses, None]
        truth = np.exp(metrics.log_softmax(logits * temper))
        labels = (generator.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1).clip(max=3)
        return logits, labels, responses if self.tokens > 1 else None


GENERATORS = {
    "calibrated": (World(), Model(1.0)),
    "slightly over-confident": (World(), Model(1.1)),
    "mildly over-confident": (World(), Model(1.3)),
    "under-confident": (World(), Model(0.6)),
    "strongly over-confident": (World(), Model(2.0)),
    "near chance": (World(spread=0.1), Model(7.6)),
    "tokens of responses of 20": (World(tokens=20, shared=0.5), Model(1.3)),
}
PAIRS = {
    "calibrated, strongly over": (Model(1.0), Model(2.0, 0.5)),
    "calibrated, mildly over": (Model(1.0), Model(1.3, 0.3)),
    "mildly over, strongly over": (Model(1.3), Model(2.0, 0.5)),
    "strongly over, the same with other noise": (Model(2.0, 0.3), Model(2.0, 0.6)),
    "under-confident, calibrated": (Model(0.6), Model(1.0)),
    "mildly over, its equal": (Model(1.3, 0.3), Model(1.3, 0.3)),
}


def true_ece(world: World, model: Model) -> float:
    """By simulation; 0 where the stated probabilities are the true ones, of which noise would show something."""
    if model == Model(1.0) and world.shared == 0:
        return 0.0
    generator = np.random.default_rng(99)
    logits, labels, _ = world.questions(TRUTH, generator)
    return metrics.expected_calibration_error(*model.answer(logits, labels, generator))


def bootstrap_ends(statistic: Callable, *arrays: Array, clusters: Array | None, value: float) -> dict[str, Array]:
    """The two intervals from resampled questions, or responses."""
    draws: list[float] = []

    def kept(*resampled: Array) -> float:
        draws.append(statistic(*resampled))
        return draws[-1]

    ends = metrics.bootstrap_interval(kept, *arrays, clusters=clusters)
    return {"bootstrap": ends, "shifted": ends - 2 * (np.mean(draws) - value)}


def one_model(world: World, model: Model, n: int, repetitions: int) -> Iterator[dict[str, Array]]:
    """Each repetition's intervals by method, and the estimates: ECE as it is seen, and corrected."""
    for repetition in range(repetitions):
        generator = np.random.default_rng([repetition, n])
        logits, labels, responses = world.questions(n, generator)
        p, y = model.answer(logits, labels, generator)
        ece = metrics.expected_calibration_error(p, y)
        old = bootstrap_ends(metrics.expected_calibration_error, p, y, clusters=responses, value=ece)
        new = metrics.infer_ece(p, y, clusters=responses)
        yield {
            "bootstrap": old["bootstrap"],
            "shifted": np.maximum(old["shifted"], 0.0),
            "calsmooth": np.array([new.low, new.high]),
            "seen": np.array([ece]),
            "corrected": np.array([new.corrected]),
            "rejected": np.array([new.p_value <= 0.05]),
        }


def two_models(first: Model, second: Model, n: int, repetitions: int) -> Iterator[dict[str, Array]]:
    """The same of the difference of two models that answer the same questions."""

    def change(p: Array, y: Array, q: Array, z: Array) -> float:
        return metrics.expected_calibration_error(q, z) - metrics.expected_calibration_error(p, y)

    for repetition in range(repetitions):
        generator = np.random.default_rng([repetition, n])
        logits, labels, _ = World().questions(n, generator)
        p, y = first.answer(logits, labels, generator)
        q, z = second.answer(logits, labels, generator)
        seen = change(p, y, q, z)
        estimate, *ends = metrics.infer_ece_difference((p, y), (q, z))
        yield {
            **bootstrap_ends(change, p, y, q, z, clusters=None, value=seen),
            "calsmooth": np.array(ends),
            "seen": np.array([seen]),
            "corrected": np.array([estimate]),
        }


def coverage(rows: list[dict[str, Array]], truth: float) -> dict[str, float]:
    """Shares of the intervals that hold the truth, their mean widths, and the means of the other entries."""
    table = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    result = {name: float(values.mean()) for name, values in table.items() if name not in METHODS}
    for name in METHODS:
        low, high = table[name].T
        result[name] = float(np.mean((low <= truth + 1e-12) & (truth <= high + 1e-12)))
        result[f"{name} width"] = float(np.mean(high - low))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--repetitions", type=int, default=300)
    arguments = parser.parse_args()
    n, repetitions = arguments.questions, arguments.repetitions

    print(f"ECE, n = {n:,}, {repetitions} repetitions: share of 95 % intervals that hold the true ECE (mean width)\n")
    print("| model | true ECE | mean ECE | mean corrected | bootstrap | shifted | calsmooth | calibration rejected |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, (world, model) in GENERATORS.items():
        truth = true_ece(world, model)
        c = coverage(list(one_model(world, model, n, repetitions)), truth)
        cells = " | ".join(f"{c[m]:.0%} ({c[f'{m} width']:.3f})" for m in METHODS)
        print(
            f"| {name} | {truth:.3f} | {c['seen']:.3f} | {c['corrected']:.3f} | {cells} | {c['rejected']:.0%} |",
            flush=True,
        )

    print("\nDifferences of ECE between two models on the same questions\n")
    print("| models | true difference | mean difference | mean corrected | bootstrap | shifted | calsmooth |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, (first, second) in PAIRS.items():
        truth = true_ece(World(), second) - true_ece(World(), first)
        c = coverage(list(two_models(first, second, n, repetitions)), truth)
        cells = " | ".join(f"{c[m]:.0%} ({c[f'{m} width']:.3f})" for m in METHODS)
        means = f"{truth:+.3f} | {c['seen']:+.3f} | {c['corrected']:+.3f}"
        print(f"| {name} | {means} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
