"""What a model predicts at chosen places of a batch, and nowhere else.

Where the model has a plain linear head (`calsmooth.heads`), the hidden states of those places go through the forward
of the fused loss: no logits exist, a chunk of them at most. Any other model's own forward is asked, with a hook in
front of its head that lets only the chosen places through, a chunk at a time; `Readout.fallback` says why.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calsmooth.errors import CalsmoothError
from calsmooth.heads import Head, final_hidden_states, find_head
from calsmooth.loss import token_statistics
from calsmooth.records import ROUNDING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of logits, or of gathered rows of the head, that exist at once."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, to which the host hands it over without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Readout:
    """Reads one model. `fallback` is None, or why its logits must be made by its own forward."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.head: Head | None = None
        self.fallback: str | None = None
        try:
            self.head = find_head(model)
        except CalsmoothError as error:
            if model.get_output_embeddings() is None:
                raise
            self.fallback = str(error)
        self._chunk_bytes = CHUNK_BYTES.get(model.device.type, CHUNK_BYTES["cpu"])

    def logprobs(
        self,
        inputs: dict[str, Any],
        rows: Tensor,  # (M,)
        positions: Tensor,  # (M,)
        place: Tensor,  # (A,)
        token: Tensor,  # (A,)
    ) -> Tensor:
        """(A,) float32 or float64: natural-log probability of `token[a]` after place number `place[a]`, at most 0.

        NaN where the model's numbers give none (see `_logprob`). One forward of the model; place m is token
        `positions[m]` of the batch's sequence `rows[m]`. All four are on the CPU, the result is on the device and isn't
        waited for.
        """
        rows, positions = send(rows, self.model.device), send(positions, self.model.device)
        if self.head is not None:
            hidden_states = final_hidden_states(self.model, self.head, **inputs)[rows, positions]  # (M, D)
            if len(place) == 0:  # a forward for its keys and values alone
                return hidden_states.new_zeros(0, dtype=torch.float32)
            return self._fused_logprobs(self.head, hidden_states, place, token)
        parts = []
        for start, logits in self._own_logits(inputs, rows, positions):
            here = ((place >= start) & (place < start + len(logits))).nonzero()[:, 0]
            picked = send(place[here] - start, logits.device), send(token[here], logits.device)
            parts.append((logits.log_softmax(dim=-1)[picked], send(here, logits.device)))
        found = torch.empty(len(place), dtype=parts[0][0].dtype, device=self.model.device)
        for values, here in parts:
            found[here] = values
        return _logprob(found)

    def token_statistics(
        self,
        inputs: dict[str, Any],
        rows: Tensor,  # (M,)
        positions: Tensor,  # (M,)
        target: Tensor,  # (M,)
    ) -> Tensor:
        """(M, 4) float32 or float64: top-1 probability, 1 where it is the target's, -log p(target), Brier score.

        The Brier score is that of the whole distribution, the sum over the vocabulary of (p - onehot)^2. Probabilities
        are from 0 to 1 and the others not below 0, or NaN where the model's numbers give no probability.
        """
        if self.head is not None:
            hidden_states = final_hidden_states(self.model, self.head, **inputs)[rows, positions]  # (M, D)
            found = token_statistics(hidden_states, self.head.weight, target, **_semantics(self.head))
            # The sum of p^2 is exp(logsumexp(2 z) - 2 logsumexp(z)), and twice the scale and softcap double the logits:
            # one more walk over the vocabulary instead of its probabilities.
            doubled = token_statistics(hidden_states, self.head.weight, target, **_semantics(self.head, factor=2.0))
            squares = (doubled.logsumexp - 2 * found.logsumexp).exp()
            return _columns(found.top_logprob, found.top_token == target, found.target_logprob, squares)
        parts = []
        for start, logits in self._own_logits(inputs, rows, positions):
            logprobs, here = logits.log_softmax(dim=-1), target[start : start + len(logits)]
            top, predicted = logprobs.max(dim=-1)
            squares = logprobs.mul(2).exp().sum(dim=-1)
            parts.append(_columns(top, predicted == here, logprobs.gather(-1, here[:, None])[:, 0], squares))
        return torch.cat(parts)

    def _fused_logprobs(self, head: Head, hidden_states: Tensor, place: Tensor, token: Tensor) -> Tensor:
        """The vocabulary is walked once a place; each further token that is asked there costs one more product."""
        device = hidden_states.device
        targets = torch.zeros(len(hidden_states), dtype=torch.long)
        targets[place] = token  # any one of those that are asked
        others = send((targets[place] != token).nonzero()[:, 0], device)
        place, token = send(place, device), send(token, device)
        found = token_statistics(hidden_states, head.weight, send(targets, device), **_semantics(head))
        logprobs = found.target_logprob[place]
        rows = max(self._chunk_bytes // (2 * hidden_states.shape[1] * found.logsumexp.element_size()), 1)
        for part in others.split(rows):
            states, weights = hidden_states[place[part]].to(logprobs.dtype), head.weight[token[part]].to(logprobs.dtype)
            logits = (states * weights).sum(dim=-1)
            if head.bias is not None:
                logits += head.bias[token[part]]
            logits *= head.scale
            if head.softcap is not None:
                logits = head.softcap * (logits / head.softcap).tanh()
            logprobs[part] = logits - found.logsumexp[place[part]]
        return _logprob(logprobs)

    def _own_logits(self, inputs: dict[str, Any], rows: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, logits (m, V)), at least float32, as the model's own forward makes them."""
        vocabulary = int(self.model.config.get_text_config(decoder=True).vocab_size)
        chunk = max(self._chunk_bytes // (4 * vocabulary), 1)
        picked: list[Tensor] = []

        def pick(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            picked.append(arguments[0][rows, positions])  # (M, D)
            return (picked[0][None, :chunk], *arguments[1:])

        yield 0, self._logits_behind(pick, inputs)
        # The other chunks ride on a forward of a single token, which costs next to nothing.
        single = {"input_ids": inputs["input_ids"][:1, :1], "use_cache": False}
        for start in range(chunk, len(rows), chunk):

            def replace(_: torch.nn.Module, arguments: tuple[Any, ...], start: int = start) -> tuple[Any, ...]:
                return (picked[0][None, start : start + chunk], *arguments[1:])

            yield start, self._logits_behind(replace, single)

    def _logits_behind(self, hook: Callable[..., tuple[Any, ...]], inputs: dict[str, Any]) -> Tensor:
        head = self.model.get_output_embeddings()
        assert head is not None
        with head.register_forward_pre_hook(hook):
            logits = self.model(**inputs).logits[0]
        return logits if logits.dtype == torch.float64 else logits.float()


def _semantics(head: Head, factor: float = 1.0) -> dict[str, Any]:
    """The arguments of `calsmooth.loss` that make `factor` times the model's logits."""
    softcap = None if head.softcap is None else factor * head.softcap
    return {"bias": head.bias, "scale": factor * head.scale, "softcap": softcap}


def _columns(top_logprob: Tensor, correct: Tensor, target_logprob: Tensor, squares: Tensor) -> Tensor:
    """(M, 4): confidence, correct, nll, Brier score. squares: the sum over the vocabulary of p^2."""
    # Each was rounded by itself. What holds of them together: the target is at most as probable as the top token, and
    # as probable where it is that token; the squares of the others' probabilities add up to at most their sum's square.
    top_logprob, target_logprob = _logprob(top_logprob), _logprob(target_logprob)
    target_logprob = torch.where(correct, top_logprob, torch.minimum(target_logprob, top_logprob))
    missed = target_logprob.expm1().square()  # (1 - p)^2
    brier = missed + (squares - target_logprob.mul(2).exp()).clamp(min=0).minimum(missed)
    return torch.stack([top_logprob.exp(), correct.to(squares.dtype), -target_logprob, brier], dim=-1)


def _logprob(values: Tensor) -> Tensor:
    """Log-probabilities, of which none is above 0: by rounding alone, one is taken for 0; by more than that, for NaN.

    NaN waits on the device until somebody reads the values, as those of a model that overflows do.
    """
    return values.clamp(max=0).masked_fill(values > ROUNDING, float("nan"))
