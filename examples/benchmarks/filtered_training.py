"""Does a head trained with `filtered` gradients end where one trained with exact ones does?

    python filtered_training.py [--steps 2000] [--vocabulary 32000] [--sharpness 10] [--json FILE]

A small model (an embedding of its context, one MLP, an untied head) learns 4,096 made-up contexts, each with a
next-token distribution of its own: a Zipf law tilted by 32 hidden features. The true distributions are known, so the
held-out loss is exact. Compared are calsmooth's modes and, as dense gradients by the logits, two ways to treat the
entries below the threshold that have been in use: their mean in the place of each, and leaving them out.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

import calsmooth
from calsmooth import linear_cross_entropy

CONTEXTS, FEATURES, D, BATCH = 4096, 32, 128, 1024
EPS = 2.0**-12


class Model(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CONTEXTS, D)
        self.up, self.down, self.norm = nn.Linear(D, 4 * D), nn.Linear(4 * D, D), nn.LayerNorm(D)
        self.head = nn.Parameter(0.15 * torch.randn(vocabulary, D))

    def forward(self, contexts: Tensor) -> Tensor:
        x = self.embedding(contexts)
        return self.norm(x + self.down(F.gelu(self.up(x))))


class DenseFiltered(torch.autograd.Function):
    """Cross-entropy of all logits whose gradient treats small softmax entries in one of the older ways."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, beta: float, way: str) -> Tensor:  # type: ignore[override]
        logprob = logits.log_softmax(1)
        p, onehot = logprob.exp(), F.one_hot(targets, logits.shape[1]).bool()
        left_out = (p < EPS) & ~onehot
        mean = (p * left_out).sum(1, keepdim=True) / left_out.sum(1, keepdim=True).clamp(min=1)
        p = torch.where(left_out, mean if way == "mean" else 0.0, p)
        ctx.gradient = (p - (1 - beta) * onehot - beta / logits.shape[1]) / len(logits)
        return F.cross_entropy(logits, targets, label_smoothing=beta)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad * ctx.gradient, None, None, None


def train(way: str, beta: float, truth: Tensor, steps: int, lr: float) -> dict[str, float | None]:
    torch.manual_seed(0)
    model = Model(truth.shape[1]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    generator = torch.Generator("cuda").manual_seed(1)
    kept_mass, kept = [], torch.ones(BATCH, device="cuda")
    for _ in range(steps):
        contexts = torch.randint(CONTEXTS, (BATCH,), generator=generator, device="cuda")
        targets = torch.multinomial(truth[contexts], 1, generator=generator).squeeze(1)
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(contexts)
            if way in ("exact", "filtered"):
                loss = linear_cross_entropy(
                    hidden, model.head, targets, label_smoothing=beta, mode=way, filter_eps=EPS, kept_mass=kept
                )
            else:
                logits = (hidden.bfloat16() @ model.head.bfloat16().T).float()
                loss = DenseFiltered.apply(logits, targets, beta, way)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept_mass.append(kept.mean())
    nll, mean_logprob, lowest = 0.0, 0.0, 0.0
    with torch.no_grad():
        for some in torch.arange(CONTEXTS, device="cuda").split(512):
            logprob = (model(some) @ model.head.T).log_softmax(1)
            nll -= float((truth[some] * logprob).sum()) / CONTEXTS
            mean_logprob += float(logprob.mean(1).sum()) / CONTEXTS
            lowest = min(lowest, float(logprob.min()))
    return {
        "nll": nll,
        "smoothed_loss": (1 - beta) * nll - beta * mean_logprob,
        "mean_logprob": mean_logprob,
        "lowest_logprob": lowest,
        "kept_mass": float(torch.stack(kept_mass).mean()) if way == "filtered" else None,
        "exact_steps": sum(float(k) == 1.0 for k in kept_mass) if way == "filtered" else steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sharpness", type=float, default=10.0, help="how far the contexts tilt the Zipf law")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)
    tilt = torch.randn(CONTEXTS, FEATURES, generator=generator, device="cuda") @ torch.randn(
        FEATURES, asked.vocabulary, generator=generator, device="cuda"
    )
    zipf = -torch.log(torch.arange(1.0, asked.vocabulary + 1, device="cuda"))
    truth = (zipf + asked.sharpness * tilt / math.sqrt(FEATURES)).softmax(1)  # (CONTEXTS, vocabulary)
    rows = []
    print(f"{'':9} beta      NLL         smoothed loss     mean log p  lowest log p  kept mass  exact steps")
    for beta in (0.0, 0.1):
        base = None
        for way in ("exact", "filtered", "mean", "left out"):
            row = train(way, beta, truth, asked.steps, asked.lr)
            base = base or row
            rows.append({"way": way, "beta": beta, **row})
            change = {k: 100 * (row[k] / base[k] - 1) for k in ("nll", "smoothed_loss")}
            print(
                f"{way:9} {beta:4} {row['nll']:8.4f} ({change['nll']:+6.1f} %) {row['smoothed_loss']:8.4f} "
                f"({change['smoothed_loss']:+6.1f} %) {row['mean_logprob']:10.2f} {row['lowest_logprob']:13.0f} "
                f"{row['kept_mass'] or math.nan:10.3f} {row['exact_steps']:12}",
                flush=True,
            )
    if asked.json:
        about = {
            "command": f"python filtered_training.py --steps {asked.steps} --vocabulary {asked.vocabulary} "
            f"--lr {asked.lr} --sharpness {asked.sharpness:g}",
            "gpu": torch.cuda.get_device_name(),
            "versions": {
                "calsmooth": calsmooth.__version__,
                "torch": torch.__version__,
                "triton": triton.__version__,
                "python": platform.python_version(),
            },
            "filter_eps": EPS,
            "rows": rows,
        }
        asked.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
