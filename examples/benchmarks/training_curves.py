"""Does a training run notice which implementation makes its loss? Loss and gradient norm, step by step.

    python training_curves.py --model DIR --dataset alpaca.json --steps 300 --output curves

Every run starts from the same weights and sees the same batches in the same order; only the loss differs:

    reference          F.cross_entropy(label_smoothing) on float32 logits of the model's own head, a bfloat16 product
    reference again    the same with the product in float32: how far rounding alone moves a run
    exact, lean, filtered    calsmooth.loss.linear_cross_entropy in its three modes

The weights are float32, the arithmetic bfloat16 (autocast) on a GPU and float32 on a CPU. Written: curves.json with
both curves of every run and each one's largest relative deviation from the reference, and curves.png. The paper's
figures 6 and 10 are the same comparison for its kernel.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calsmooth.data import load_examples
from calsmooth.environment import environment
from calsmooth.heads import Head, find_head, run_without_head
from calsmooth.loss import linear_cross_entropy
from calsmooth.models import load_model, load_tokenizer

LossOfHead = Callable[[Tensor, Head, Tensor, float], Tensor]
"""(hidden states (N, D), head, targets (N,), beta) -> mean loss"""


def reference(h: Tensor, head: Head, y: Tensor, beta: float) -> Tensor:
    return F.cross_entropy(head.logits(h).float(), y, label_smoothing=beta)


def reference_again(h: Tensor, head: Head, y: Tensor, beta: float) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return F.cross_entropy(head.logits(h.float()), y, label_smoothing=beta)


def fused(mode: str) -> LossOfHead:
    def loss(h: Tensor, head: Head, y: Tensor, beta: float) -> Tensor:
        return linear_cross_entropy(
            h, head.weight, y, bias=head.bias, label_smoothing=beta, softcap=head.softcap, scale=head.scale, mode=mode
        )

    return loss


RUNS: dict[str, LossOfHead] = {
    "reference": reference,
    "reference again": reference_again,
    "exact": fused("exact"),
    "lean": fused("lean"),
    "filtered": fused("filtered"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--runs", default=",".join(RUNS), help="of: " + ", ".join(RUNS))
    parser.add_argument("--output", type=Path, default=Path("curves"))
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = make_batches(options, device)
    options.output.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in options.runs.split(","):
        begin = time.perf_counter()
        curves[name] = train(RUNS[name], batches, options, device)
        print(f"{name}: last loss {curves[name]['loss'][-1]:.6f} in {time.perf_counter() - begin:.0f} s", flush=True)
        write(curves, options, device)  # whatever a time limit does to the next one


def write(curves: dict[str, dict[str, list[float]]], options: argparse.Namespace, device: torch.device) -> None:
    deviations = {name: deviation(curve, curves["reference"]) for name, curve in curves.items() if name != "reference"}
    for name, largest in list(deviations.items())[-1:]:
        print(f"{name}: largest deviation of the loss {largest['loss']:.1e}, of the norm {largest['grad_norm']:.1e}")
    result = {
        "environment": environment(device),
        "options": {key: str(value) for key, value in vars(options).items()},
        "largest_relative_deviation": deviations,
        "curves": curves,
    }
    (options.output / "curves.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(curves, options.output / "curves.png")


def make_batches(options: argparse.Namespace, device: torch.device) -> list[dict[str, Tensor]]:
    tokenizer = load_tokenizer(options.model)
    examples = load_examples(options.dataset, tokenizer, max_length=options.max_length, on_bad_row="skip")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for step in range(options.steps):
        start = step * options.batch_size % (len(order) - options.batch_size)
        chosen = [examples[i] for i in order[start : start + options.batch_size]]
        length = max(len(example.input_ids) for example in chosen)

        def padded(rows: list[list[int]], value: int, length: int = length) -> Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows], device=device)

        labels = padded([example.labels for example in chosen], -100)
        batches.append(
            {
                "input_ids": padded([example.input_ids for example in chosen], 0),
                "attention_mask": padded([[1] * len(example.input_ids) for example in chosen], 0),
                "targets": F.pad(labels[:, 1:], (0, 1), value=-100),
            }
        )
    return batches


def train(
    loss_of_head: LossOfHead, batches: list[dict[str, Tensor]], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = load_model(options.model, dtype=torch.float32, device=device).train()
    head = find_head(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 20)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states, _ = run_without_head(
                model, head, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
            wanted = batch["targets"] != -100
            loss = loss_of_head(states[wanted], head, batch["targets"][wanted], options.beta)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).detach())
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": torch.stack(losses).tolist(), "grad_norm": torch.stack(norms).tolist()}


def deviation(curve: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """The largest |a - b| / b over all steps, of each curve."""
    return {
        key: max(abs(a - b) / b for a, b in zip(curve[key], expected[key], strict=True))
        for key in ("loss", "grad_norm")
    }


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    for column, (key, title) in enumerate((("loss", "loss"), ("grad_norm", "gradient norm"))):
        expected = curves["reference"][key]
        for width, (name, curve) in zip((4.0, 2.5, 2.0, 1.4, 0.8), curves.items(), strict=False):
            axes[0][column].plot(curve[key], label=name, linewidth=width)
            if name != "reference":
                differences = [abs(a - b) / b for a, b in zip(curve[key], expected, strict=True)]
                axes[1][column].plot(
                    differences, label=name, linewidth=0.8, color=axes[0][column].lines[-1].get_color()
                )
        axes[0][column].set_title(title)
        axes[1][column].set_yscale("log")
        axes[1][column].set_xlabel("step")
    axes[1][0].set_ylabel("relative deviation\nfrom the reference")
    axes[0][1].legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
