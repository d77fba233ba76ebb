"""Prompts as token ids: the split into context and continuation, and what only some choices' contexts hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.prompts import Prompt, cloze, letters, plain_prompt
from calsmooth.evaluate.questions import Question
from calsmooth.evaluate.requests import Encoder, Request, common_prefix
from calsmooth.evaluate.scoring import Scorer
from calsmooth.evaluate.tasks import CHOICE_TASKS

ASKED = Question("q", "abstract_algebra", " What is 1 + 1? ", ("one", "two", "None", "NA"), 1)
SHOT = Question("s", "abstract_algebra", "What is 0 + 1?", ("zero", "one", "two", "three"), 1)


def letter_prompt(question, examples):
    return plain_prompt(letters(CHOICE_TASKS["mmlu"], "hendrycks"), question, examples)


def test_which_tokens_are_scored():
    assert list(Request([1], [[2, 3], [4]]).scored(0)) == [0, 1]
    request = Request([1], [[2, 3, 4], [5, 6]], given=(2, 0))
    assert list(request.scored(0)) == [2]
    assert list(request.scored(1)) == [0, 1]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("reuse", [True, False])
def test_given_tokens_are_read_and_not_scored(build, kind, reuse):
    model = build(kind, torch.float64)
    request = Request(list(range(5, 40)), [[41, 42, 43, 44], [50, 43, 44], [43, 44]], given=(2, 1, 0))
    for requests in ([request], [request, Request([*request.context, 3], request.continuations)]):
        got = Scorer(model, reuse=reuse).score(requests)[0]
        for value, before in zip(got, ([41, 42], [50], []), strict=True):
            with torch.no_grad():
                logprobs = model(torch.tensor([request.context + before + [43, 44]])).logits[0].log_softmax(dim=-1)
            expected = logprobs[-3, 43] + logprobs[-2, 44]
            assert value == pytest.approx(float(expected), abs=1e-5)


def test_contexts_that_part_at_the_blank(tokenizer):
    sentence = "A man is on a roof so _ starts pulling up roofing."
    question = Question("q", "common sense", sentence, ("the sky", "the man"), 1)
    prompt = plain_prompt(cloze(CHOICE_TASKS["winogrande"]), question, [])
    request = Encoder(tokenizer, None)(prompt)
    for k, option in enumerate(question.choices):
        whole = tokenizer(sentence.replace("_", option))["input_ids"]
        assert request.context + request.continuations[k] == whole
        given = request.context + request.continuations[k][: request.given[k]]
        assert tokenizer.decode(given) == f"A man is on a roof so {option}"
        scored = [request.continuations[k][j] for j in request.scored(k)]
        assert tokenizer.decode(scored) == " starts pulling up roofing."
    assert tokenizer.decode(request.context).startswith("A man is on a roof so")


def test_the_split_is_at_the_longest_common_token_prefix(tokenizer):
    encode = Encoder(tokenizer, None)
    prompt = letter_prompt(ASKED, [SHOT])
    request = encode(prompt)
    for continuation, ids in zip(prompt.continuations, request.continuations, strict=True):
        assert tokenizer.decode(request.context + ids) == prompt.text(1) + continuation
        assert request.context + ids == tokenizer(prompt.text(1) + continuation)["input_ids"]


def test_a_token_that_spans_the_seam_belongs_to_the_continuation(tokenizer):
    # This tokenizer has a token for "nswer", so that the tokens of "Ans" aren't how "Answer" begins.
    pieces = tokenizer("Ans")["input_ids"]
    assert tokenizer("Answer")["input_ids"][: len(pieces)] != pieces
    request = Encoder(tokenizer, None)(Prompt(lambda k: "the Ans", 0, ("wer", "xyz")))
    assert tokenizer.decode(request.context + request.continuations[0]) == "the Answer"
    assert tokenizer.decode(request.context + request.continuations[1]) == "the Ansxyz"
    assert len(request.context) < len(tokenizer("the Ans")["input_ids"])


PIECE = st.text(st.sampled_from(" \n\nAnswer:roofblueTh."), max_size=12)
ANSWER = st.text(st.sampled_from(" Answerblue."), min_size=1, max_size=6)


@given(text=PIECE, parts=st.lists(st.tuples(PIECE, ANSWER), min_size=2, max_size=4), part=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_text_is_tokenised_whole_and_scored_from_where_the_answer_begins(tokenizer, text, parts, part):
    openings = tuple(opening for opening, _ in parts) if part else ()
    prompt = Prompt(lambda k: text, 0, tuple(answer for _, answer in parts), openings)
    request = Encoder(tokenizer, None)(prompt)
    for k, (opening, answer) in enumerate(parts):
        before = text + opening * part
        whole = tokenizer(before + answer)["input_ids"]
        ids = request.context + request.continuations[k]
        assert ids[-len(whole) :] == whole
        assert ids[: -len(whole)] in ([], [tokenizer.eos_token_id])  # where no token stands before the first
        scored = request.scored(k)
        assert 0 <= scored.start < scored.stop == len(request.continuations[k])
        # All of the answer is scored; of what is before it, only what a token of the answer holds as well.
        tail = tokenizer.decode(request.continuations[k][scored.start :])
        assert tail.endswith(answer)
        assert (before + answer).endswith(tail)


@given(
    heads=st.lists(PIECE, min_size=1, max_size=3),
    lasts=st.lists(st.tuples(PIECE, ANSWER), min_size=1, max_size=4),
    between=st.sampled_from(["\n\n", "\n", "\n\n\n", " \n\n", "\n\n "]),
)
@settings(max_examples=100, deadline=None)
def test_what_prompts_share_is_tokenised_once_and_as_in_the_whole(tokenizer, heads, lasts, between):
    encode = Encoder(tokenizer, None)
    assert encode._heads is not None
    for head in heads:
        for last, answer in lasts:
            text = f"{head}{between}{last}"
            request = encode(Prompt(lambda k, text=text: text, 0, (answer, answer + "s")))
            whole = tokenizer(text + answer)["input_ids"]
            assert (request.context + request.continuations[0])[-len(whole) :] == whole


def test_nothing_is_shared_by_a_tokenizer_that_may_join_paragraphs(tokenizer):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(split, **added):
        words = Tokenizer(models.BPE({"x": 0, "a": 1, "Ċ": 2, "b": 3, "Ġ": 4}, []))
        words.pre_tokenizer = split
        if added:
            words.add_tokens([AddedToken(**added)])
        return Encoder(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="x"), None)

    assert made(pre_tokenizers.ByteLevel(add_prefix_space=False))._heads is not None
    assert made(None)._heads is None
    assert made(pre_tokenizers.Split(" ", "merged_with_previous"))._heads is None
    assert made(pre_tokenizers.ByteLevel(add_prefix_space=False), content="\n\nHuman:")._heads is None
    assert made(pre_tokenizers.ByteLevel(add_prefix_space=False), content="Human", lstrip=True)._heads is None
    # One that puts a space before every text: what is tokenised alone isn't how it stands in the whole.
    spaced = made(pre_tokenizers.ByteLevel(add_prefix_space=True))
    prompt = Prompt(lambda k: "a\n\na", 0, ("b", "a"))
    assert spaced(prompt).context == spaced.tokenizer("a\n\na")["input_ids"]
    assert spaced._heads is None


def test_a_beginning_token_is_added_once():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "</s>": 4, "?": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 4)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    encode = Encoder(tokenizer, None)
    request = encode(Prompt(lambda k: "a b", 0, (" c", " a")))
    assert request.context == [0, 1, 2]
    assert request.continuations == [[3], [1]]
    assert encode(Prompt(lambda k: "a b", 0, (" c", " a"), special_tokens=False)).context == [1, 2]
    assert encode(Prompt(lambda k: "", 0, ("c", "a"), special_tokens=False)).context == [0]


def test_too_long_prompts_lose_their_last_shots_first(tokenizer):
    shots = [Question(str(i), "x", f"Example {i}?", ("yes", "no"), 0) for i in range(4)]
    prompt = letter_prompt(ASKED, shots)
    lengths = [Encoder(tokenizer, None)(Prompt(lambda _, k=k: prompt.text(k), 0, prompt.continuations)).length()
               for k in range(5)]  # fmt: skip
    assert Encoder(tokenizer, lengths[4])(prompt).dropped_shots == 0
    request = Encoder(tokenizer, lengths[4] - 1)(prompt)
    assert request.dropped_shots == 1
    assert "Example 2?" in tokenizer.decode(request.context)
    assert "Example 3?" not in tokenizer.decode(request.context)
    bare = Encoder(tokenizer, lengths[0] - 3)(prompt)
    assert bare.dropped_shots == 4
    assert bare.truncated
    assert bare.length() == lengths[0] - 3
    assert tokenizer.decode(bare.context).endswith("D. NA\nAnswer:")


def test_an_answer_longer_than_the_limit_is_an_error(tokenizer):
    with pytest.raises(CalsmoothError, match="--max-length 2: too short"):
        Encoder(tokenizer, 2)(Prompt(lambda k: "the", 0, (" quite a long answer", " b")))


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == []
    assert common_prefix([[5, 6], [5, 6]]) == [5, 6]
