"""A real head: what section 4 says it could do, and what it does on a text.

The model's decoder runs over the text batch by batch. Of each hidden state that predicts a token, the norm and the
largest entry are kept, and what `calsmooth.loss.token_statistics` says of the prediction, which never holds the logits;
the hidden states themselves only pass through the running covariance. So memory doesn't grow with the text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from calsmooth.data import IGNORED, Example
from calsmooth.entropy_bound.bound import Array, entropy_bound
from calsmooth.entropy_bound.diversity import FeatureDiversity, RunningCovariance
from calsmooth.entropy_bound.spectrum import SingularValue, largest_singular_value, row_mean
from calsmooth.errors import CalsmoothError
from calsmooth.heads import Head, final_hidden_states, find_head
from calsmooth.loss import TokenStatistics, token_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

PEAKS = 512
"""Tokens of the vocabulary, evenly spaced, that the head is asked to be sure of."""


@dataclass(frozen=True)
class Reach:
    """What Theorem 4.2 wants to know of a head, and what follows. Logits are softcap(scale * (C h + bias)).

    sigma_c, sigma_c_centred: the largest singular value of C, and of C without its rows' mean, which softmax ignores.
    bias_norm, bias_norm_centred: Euclidean norm of the bias, 0 where there is none.
    """

    vocab: int
    hidden: int
    sigma_c: SingularValue
    sigma_c_centred: SingularValue
    bias_norm: float
    bias_norm_centred: float
    scale: float
    softcap: float | None

    def radius(self, norm: float | Array, *, centred: bool = False) -> float | Array:
        """No hidden state of this norm gives longer logits: Lemma 4.1, with the scale and the bias. A softcap shortens
        them only, and keeps the floor (see `calsmooth.entropy_bound.bound`)."""
        sigma = self.sigma_c_centred if centred else self.sigma_c
        bias = self.bias_norm_centred if centred else self.bias_norm
        return self.scale * (sigma.value * norm + bias)

    def floor(self, norm: float | Array, *, centred: bool = False) -> Array:
        """The least entropy of a prediction from a hidden state of this norm, in nats (Theorem 4.2)."""
        return entropy_bound(self.vocab, 1, self.radius(norm, centred=centred))


@dataclass(frozen=True)
class Tokens:
    """What was measured of each prediction, (N,) float64 each; entropies in nats.

    norm, largest: of the hidden state, ||h|| and max |h_i|. confidence: the top token's probability. correct: 1 where
    the top token is the text's next.
    """

    entropy: Array
    confidence: Array
    correct: Array
    nll: Array
    norm: Array
    largest: Array

    def __len__(self) -> int:
        return len(self.entropy)


@dataclass(frozen=True)
class Peaks:
    """What the head gives for hidden states that point straight at one token, each as long as the text's median one.

    token: (P,) which. probability: (P,) of that token. entropy: (P,) nats. They are attained: the true least entropy of
    the head is no higher. Whether the layers below can produce such a hidden state is another question.
    """

    token: np.ndarray
    probability: Array
    entropy: Array


@dataclass(frozen=True)
class Measurement:
    """All that is measured of one model on one text."""

    reach: Reach
    tokens: Tokens
    peaks: Peaks
    diversity: FeatureDiversity


@torch.no_grad()
def measure(
    model: "PreTrainedModel", examples: Sequence[Example], *, advance: Callable[..., None] = lambda *_: None
) -> Measurement:
    """Measure the head of a model in evaluation mode on every label of the examples.

    advance: called with the number of predictions that have just been measured.

    Raises:
        CalsmoothError: the model's head isn't linear, or does to its logits what is neither a factor nor a softcap;
            numbers aren't finite; or there is nothing to predict.
    """
    head = find_head(model)
    reach = measure_reach(head)
    covariance = RunningCovariance(reach.hidden)
    found: list[Tensor] = []
    for hidden_states, targets in hidden_states_of(model, head, examples):
        statistics = _statistics(head, hidden_states, targets)
        h = hidden_states.float()
        columns = (
            statistics.entropy.clamp(min=0),
            statistics.top_logprob.exp(),
            statistics.top_token == targets,
            -statistics.target_logprob,
            h.norm(dim=1),
            h.abs().amax(dim=1),
        )
        found.append(torch.stack([column.float() for column in columns]).cpu().double())
        covariance.add(hidden_states)
        advance(len(targets))
    if not found:
        raise CalsmoothError("the text has no token to predict; give a longer one")
    table = torch.cat(found, dim=1).numpy()
    if not np.isfinite(table).all():
        raise CalsmoothError("the model gave numbers that are not finite; try --dtype float32")
    tokens = Tokens(*table)
    peaks = find_peaks(head, float(np.median(tokens.norm)))
    return Measurement(reach, tokens, peaks, covariance.diversity())


def measure_reach(head: Head) -> Reach:
    """Sizes, singular values and norms of a head.

    Raises:
        CalsmoothError: the head has entries that aren't finite.
    """
    weight = head.weight
    b = np.zeros(1) if head.bias is None else head.bias.detach().cpu().double().numpy()
    return Reach(
        vocab=weight.shape[0],
        hidden=weight.shape[1],
        sigma_c=largest_singular_value(weight),
        sigma_c_centred=largest_singular_value(weight, centred=True),
        bias_norm=float(np.linalg.norm(b)),
        bias_norm_centred=float(np.linalg.norm(b - b.mean())),
        scale=head.scale,
        softcap=head.softcap,
    )


@torch.no_grad()
def find_peaks(head: Head, norm: float) -> Peaks:
    """Hidden states along the rows of the centred head, the direction in which a token's logit outgrows the mean's."""
    weight = head.weight
    chosen = torch.linspace(0, len(weight) - 1, min(PEAKS, len(weight))).round().long().to(weight.device)
    rows = weight[chosen].float() - torch.from_numpy(row_mean(weight)).to(weight.device, torch.float32)
    hidden_states = rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-30))
    statistics = _statistics(head, hidden_states.to(weight.dtype), chosen)
    return Peaks(
        token=chosen.cpu().numpy(),
        probability=statistics.target_logprob.exp().cpu().double().numpy(),
        entropy=statistics.entropy.clamp(min=0).cpu().double().numpy(),
    )


@torch.no_grad()
def hidden_states_of(
    model: "PreTrainedModel", head: Head, examples: Sequence[Example]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(hidden states (n, D) as the head reads them, next tokens (n,)) of each batch's labels."""
    budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    start = 0
    while start < len(examples):
        stop, width = start, 0
        while stop < len(examples):
            width = max(width, len(examples[stop].input_ids))
            if stop > start and width * (stop + 1 - start) > budget:
                break
            stop += 1
        tokens, labels = _padded(examples[start:stop])
        start = stop
        # Right padding is behind everything that is asked: causal attention needs no mask for it.
        ids = tokens.to(model.device)
        states = final_hidden_states(model, head, input_ids=ids, attention_mask=torch.ones_like(ids))  # (B, T, D)
        targets = labels[:, 1:].to(model.device)
        wanted = targets != IGNORED
        yield states[:, :-1][wanted], targets[wanted]


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    width = max(len(example.input_ids) for example in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED, dtype=torch.long)
    for r, example in enumerate(batch):
        tokens[r, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[r, : len(example.labels)] = torch.tensor(example.labels)
    return tokens, labels


def _statistics(head: Head, hidden_states: Tensor, targets: Tensor) -> TokenStatistics:
    return token_statistics(hidden_states, head.weight, targets, bias=head.bias, softcap=head.softcap, scale=head.scale)
