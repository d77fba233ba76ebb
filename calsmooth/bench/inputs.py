"""What the methods are fed: hidden states, head and targets, and the statistics by which a reader can judge them.

How fast a method is may depend on its data: gradient filtering skips what the softmax leaves near zero, and a randomly
initialised head leaves nothing, a trained one almost everything. The default inputs therefore imitate a trained
model's logits:

* a prior over tokens, Zipf's law with log-normal scatter, of which a contiguous part (other scripts, code, reserved
  entries) is all but unused by any one text;
* plus independent Gaussian evidence for every token, of a strength that varies from token to token. The largest of very
  many Gaussians follow the power law by which real models' probabilities fall with rank (the random energy model).

Targets are drawn from the resulting softmax, so that the imitated model is calibrated. `--inputs randn` is the
untrained head, `--model` the real thing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calsmooth.bench.shapes import Shape
from calsmooth.errors import CalsmoothError, UsageError

EPS = 2.0**-12
"""Softmax entries below this are what cut-cross-entropy's default filter drops for bfloat16 inputs."""

PRIOR_SCATTER = 2.5  # nats, standard deviation around Zipf's law
PRIOR_OFFSET = 10.0  # Zipf-Mandelbrot: frequencies fall as 1 / (rank + offset)
UNUSED_SHARE, UNUSED_BLOCK, UNUSED_PENALTY = 0.6, 512, 7.0
EVIDENCE, EVIDENCE_SPREAD = 5.2, 0.25  # nats; standard deviation of its logarithm over tokens
PRIOR_HIDDEN = 4.0  # the hidden entry that reads the prior off the head's first column

LOGIT_BYTES = 256 * 2**20  # of one chunk when statistics are taken
WINDOW = 1024  # tokens that a model reads at once


@dataclass(frozen=True)
class Inputs:
    """One problem: logits are softcap(hidden_states @ lm_head_weight.T)."""

    hidden_states: Tensor  # (N, D)
    lm_head_weight: Tensor  # (V, D)
    targets: Tensor  # (N,), int64
    softcap: float | None
    name: str  # of the preset or model, '' for sizes given by hand

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(N, V, D)"""
        return len(self.hidden_states), *self.lm_head_weight.shape

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_states.dtype


@dataclass(frozen=True)
class Statistics:
    """Means over tokens of what the softmax looks like; nats."""

    tokens: int
    top1: float
    entropy: float
    nll: float
    entries_above_eps: float  # per token
    mass_above_eps: float
    active_tiles: float  # share of blocks of 128 tokens x 256 entries that hold an entry above eps


def random_inputs(
    shape: Shape, tokens: int, kind: str, *, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """Inputs of the given kind, 'model-like' or 'randn', the same for the same seed and device."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    V, D = shape.vocab, shape.hidden
    head = randn(V, D).mul_(1 / math.sqrt(D))
    states = randn(tokens, D)
    if kind == "randn":
        targets = torch.randint(0, V, (tokens,), generator=generator, device=device)
        return Inputs(states.to(dtype), head.to(dtype), targets, shape.softcap, shape.name)

    prior = -torch.log(torch.arange(V, device=device) + PRIOR_OFFSET) + PRIOR_SCATTER * randn(V)
    blocks = torch.rand(math.ceil(V / UNUSED_BLOCK), generator=generator, device=device) < UNUSED_SHARE
    blocks[0] = False  # the most frequent tokens belong to every text
    prior -= UNUSED_PENALTY * blocks.repeat_interleave(UNUSED_BLOCK)[:V]
    head[:, 0] = (prior - prior.mean()) / PRIOR_HIDDEN
    states *= EVIDENCE * torch.exp(EVIDENCE_SPREAD * randn(tokens, 1))
    states[:, 0] = PRIOR_HIDDEN
    inputs = Inputs(states.to(dtype), head.to(dtype), torch.empty(0), shape.softcap, shape.name)
    targets = torch.cat(
        [torch.multinomial(p.exp(), 1, generator=generator)[:, 0] for p in _log_probabilities(inputs, tokens)]
    )
    return Inputs(inputs.hidden_states, inputs.lm_head_weight, targets, shape.softcap, shape.name)


def model_inputs(model_name: str, text: Path, tokens: int, *, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A model's own head, and its hidden states (after the final norm) on a text, with the text's next tokens.

    A factor on the logits, as Cohere and Granite have it, is folded into the hidden states.

    Raises:
        UsageError: the text has too few tokens, or the model's head has a bias.
        CalsmoothError: the file isn't text, or the model's logits aren't a (softcapped) product with its head.
    """
    from calsmooth.models import check_vocabulary, load_model, load_tokenizer, model_label

    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CalsmoothError(f"--text {text}: not UTF-8 text") from None
    ids = torch.tensor(load_tokenizer(model_name)(content)["input_ids"], dtype=torch.long)
    model = load_model(model_name, dtype=dtype, device=device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW) or WINDOW
    windows = ids.split(min(WINDOW, limit))
    available = sum(len(window) - 1 for window in windows)
    if available < tokens:
        raise UsageError(f"--text {text}: gives {available} tokens with a next one, --tokens asks for {tokens}")
    check_vocabulary(model_name, model.config, int(ids.max()))

    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UsageError(f"--model {model_name}: its head has a bias, which bench doesn't time")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    states: list[Tensor] = []
    targets: list[Tensor] = []
    found = 0
    with torch.no_grad():
        for window in windows:
            window = window.to(device)
            h = model.base_model(input_ids=window[None]).last_hidden_state[0] * scale
            if not states:
                expected = model(input_ids=window[None]).logits[0].float()
                _check_head(model_name, softcapped((h @ head.weight.T).float(), softcap), expected)
            states.append(h[:-1])
            targets.append(window[1:])
            found += len(window) - 1
            if found >= tokens:
                break
        hidden_states = torch.cat(states)[:tokens].clone()
    weight = head.weight.detach().clone()
    return Inputs(hidden_states, weight, torch.cat(targets)[:tokens].clone(), softcap, model_label(model_name))


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def describe(inputs: Inputs, tokens: int = 1024) -> Statistics:
    """Statistics of the softmax over the first `tokens` tokens."""
    tokens = min(tokens, len(inputs.hidden_states))
    V = len(inputs.lm_head_weight)
    totals = torch.zeros(5, dtype=torch.float64)
    tiles = active = start = 0
    for log_p in _log_probabilities(inputs, tokens):
        p = log_p.exp()
        above = p >= EPS
        nll = -log_p.gather(1, inputs.targets[start : start + len(p)].unsqueeze(1)).sum()
        start += len(p)
        means = (p.amax(1).sum(), -(p * log_p.nan_to_num(neginf=0)).sum(), nll, above.sum(), p[above].sum())
        totals += torch.tensor([float(x) for x in means], dtype=torch.float64)
        columns = torch.nn.functional.pad(above, (0, -V % 256)).view(len(p), -1, 256).any(2)
        for rows in columns.split(128):
            tiles += columns.shape[1]
            active += int(rows.any(0).sum())
    top1, entropy, nll_mean, entries, mass = (totals / tokens).tolist()
    return Statistics(tokens, top1, entropy, nll_mean, entries, mass, active / tiles)


def _log_probabilities(inputs: Inputs, tokens: int) -> Iterator[Tensor]:
    """Log-softmax of the first `tokens` tokens, float32, in chunks of whole blocks of 128 rows where they fit."""
    V = len(inputs.lm_head_weight)
    rows = max(1, LOGIT_BYTES // (4 * V))
    rows = rows // 128 * 128 or rows
    for states in inputs.hidden_states[:tokens].split(rows):
        logits = (states @ inputs.lm_head_weight.T).float()
        yield torch.log_softmax(softcapped(logits, inputs.softcap), -1)


def _check_head(model_name: str, ours: Tensor, theirs: Tensor) -> None:
    """Fail closed where an architecture does more between hidden states and logits than we know of."""
    difference = float((ours - theirs).abs().mean() / theirs.abs().mean())
    if not difference < 0.02:
        raise CalsmoothError(
            f"--model {model_name}: its logits differ by {difference:.1%} from the product of its last hidden states "
            "and its head; bench can't rebuild what this architecture does to them"
        )
