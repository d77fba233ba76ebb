"""Prompts as token ids: where the context ends and each continuation begins, and what to do when it is too long."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAGRAPH = re.compile(r"\n\n(?=[^\W\d_])")
"""Where a paragraph begins with a letter."""
MOST_HEADS = 256
"""Kept tokenised; subjects have one each, so that more are questions of several paragraphs."""


@dataclass(frozen=True)
class Request:
    """Token ids: `context` holds at least one, and so does each of `continuations`, which follow it directly.

    given: of each continuation, how many of its first tokens are only read and not scored (fewer than it has); none
        where it is empty. So contexts that part only near their end still share all that comes before.
    dropped_shots: solved examples left out so that it fits. truncated: the context's beginning had to go as well.
    """

    context: list[int]
    continuations: list[list[int]]
    given: tuple[int, ...] = ()
    dropped_shots: int = 0
    truncated: bool = False

    def length(self) -> int:
        """The longest sequence that is run: the last token of a continuation is never fed."""
        return len(self.context) + max(map(len, self.continuations)) - 1

    def scored(self, choice: int) -> range:
        """Which tokens of a continuation have their log-probabilities added up."""
        return range(self.given[choice] if self.given else 0, len(self.continuations[choice]))


class Encoder:
    """Turns prompts into requests of at most `max_length` tokens (no limit where it is None)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = tokenizer("a")["input_ids"]
        # What the tokenizer puts in front of any text; what it may put behind belongs to the end of a text, not here.
        self.beginning = next((framed[:i] for i in range(len(framed)) if framed[i : i + len(bare)] == bare), framed[:0])
        self._heads: dict[str, list[int]] | None = {} if _parts_paragraphs(tokenizer) else None

    def __call__(self, prompt: Prompt) -> Request:
        """The request for a prompt with as many of its solved examples as fit.

        The text is tokenised whole, with each continuation, and split at the longest token prefix that these have in
        common with the prompt alone: pieces tokenised apart may not be what the model would see.

        Raises:
            CalsmoothError: a continuation alone is longer than `max_length`.
        """
        shots = prompt.shots
        request = self._encode(prompt, shots)
        while self.max_length is not None and request.length() > self.max_length and shots > 0:
            shots -= 1
            request = self._encode(prompt, shots)
        excess = 0 if self.max_length is None else max(request.length() - self.max_length, 0)
        if excess >= len(request.context):
            raise CalsmoothError(
                f"--max-length {self.max_length}: too short for the answer {prompt.continuations[0]!r}"
            )
        dropped, context = prompt.shots - shots, request.context[excess:]
        return replace(request, context=context, dropped_shots=dropped, truncated=excess > 0)

    def _encode(self, prompt: Prompt, shots: int) -> Request:
        text = prompt.text(shots)
        openings = prompt.openings or ("",)
        contexts = [text + opening for opening in openings]
        each = contexts if prompt.openings else contexts * len(prompt.continuations)
        texts = [before + continuation for before, continuation in zip(each, prompt.continuations, strict=True)]
        ids = self._token_ids(text, [*contexts, *texts])
        read, whole = ids[: len(contexts)], ids[len(contexts) :]
        split = len(common_prefix(ids))
        # Where contexts differ, what a continuation shares with its own is given.
        pairs = zip(read, whole, strict=True) if prompt.openings else ()
        given = tuple(len(common_prefix([a, b])) - split for a, b in pairs)
        context = (self.beginning if prompt.special_tokens else []) + read[0][:split]
        if not context:
            # Nothing to condition the first token on: a model without a beginning token takes its end token for it.
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            context = [eos if bos is None else bos]
        return Request(context, [tokens[split:] for tokens in whole], given)

    def _token_ids(self, text: str, texts: list[str]) -> list[list[int]]:
        """Of each of `texts`, all of which begin with `text`; by itself, without special tokens.

        What comes before the last paragraph (solved examples, mostly) is tokenised once for all prompts that have it,
        where the tokenizer never joins what a paragraph ends with to what the next one begins with.
        """
        at = max((match.end() for match in PARAGRAPH.finditer(text)), default=0)
        heads = self._heads
        if heads is None or at == 0:
            return self._tokenised(texts)
        tails = [whole[at:] for whole in texts]
        head = heads.get(text[:at])
        if head is not None:
            return [head + tail for tail in self._tokenised(tails)]
        whole, last, *rest = self._tokenised([text, text[at:], *tails])
        if whole[len(whole) - len(last) :] != last:  # the tokenizer does something to where a text begins
            self._heads = None
            return self._tokenised(texts)
        if len(heads) >= MOST_HEADS:
            heads.clear()
        head = heads[text[:at]] = whole[: len(whole) - len(last)]
        return [head + tail for tail in rest]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer written in Python
            return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        # Straight to the Rust tokenizer, which lets other threads work meanwhile; the wrapper around it makes masks and
        # offsets that no one reads, half of its time.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _parts_paragraphs(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer cuts text apart in front of a letter that begins a paragraph, whatever lies around it.

    Byte-level tokenizers do: they split by a pattern that takes line breaks and letters for different words, and make
    tokens within words. So what comes before depends on nothing behind, and the other way round.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or backend.pre_tokenizer is None:
        return False
    added = backend.get_added_tokens_decoder().values()  # which are found before anything is cut
    if any(PARAGRAPH.search(token.content) or (token.lstrip and token.content[:1].isalpha()) for token in added):
        return False
    for before in ("a", ".", " ", "1", "\n", "é"):
        for first in ("A", "z", "É", "中", "²"):
            pieces = backend.pre_tokenizer.pre_tokenize_str(f"x{before}\n\n{first}b c")
            if 4 not in [start for _, (start, _) in pieces]:
                return False
    return True


def shared_prefix(requests: Sequence[Request]) -> list[int]:
    """The longest token prefix that all contexts share, leaving each at least one token of its own."""
    contexts = [request.context for request in requests]
    shortest = min(map(len, contexts))
    return common_prefix(contexts)[: shortest - 1]


def common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # what these two share, everything in between shares
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
