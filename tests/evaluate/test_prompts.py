"""Prompts byte for byte, and their split into tokens."""

import pytest

from calsmooth.errors import CalsmoothError
from calsmooth.evaluate.prompts import Prompt, cloze_prompt, conversation_prompt, letter_prompt
from calsmooth.evaluate.questions import Question
from calsmooth.evaluate.requests import Encoder, common_prefix
from calsmooth.evaluate.tasks import CHOICE_TASKS

ASKED = Question("q", "abstract_algebra", " What is 1 + 1? ", ("one", "two", "None", "NA"), 1)
SHOT = Question("s", "abstract_algebra", "What is 0 + 1?", ("zero", "one", "two", "three"), 1)


def test_the_original_mmlu_prompt():
    prompt = letter_prompt(ASKED, [SHOT], "hendrycks")
    assert prompt.text(1) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "What is 0 + 1?\nA. zero\nB. one\nC. two\nD. three\nAnswer: B\n\n"
        " What is 1 + 1? \nA. one\nB. two\nC. None\nD. NA\nAnswer:"
    )
    assert prompt.text(0) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        " What is 1 + 1? \nA. one\nB. two\nC. None\nD. NA\nAnswer:"
    )
    assert prompt.continuations == (" A", " B", " C", " D")


def test_the_lm_eval_prompt_has_one_space_and_a_stripped_question():
    text = letter_prompt(ASKED, [SHOT], "lm-eval").text(1)
    assert text.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\nWhat")
    assert "\n\nWhat is 1 + 1?\nA. one\n" in text


def test_letters_follow_the_number_of_choices():
    five = Question("q", "science", "Which?", ("a", "b", "c", "d", "e"), 4)
    assert letter_prompt(five, [], "hendrycks").continuations[-1] == " E"
    three = Question("q", "science", "Which?", ("a", "b", "c"), 0)
    assert len(letter_prompt(three, [], "hendrycks").continuations) == 3


def test_cloze_prompts():
    arc = cloze_prompt(CHOICE_TASKS["arc_easy"], ASKED, [SHOT])
    assert arc.text(1) == "Question: What is 0 + 1?\nAnswer: one\n\nQuestion: What is 1 + 1?\nAnswer:"
    assert arc.continuations == (" one", " two", " None", " NA")
    mmlu = cloze_prompt(CHOICE_TASKS["mmlu"], ASKED, [])
    assert mmlu.text(0).startswith("The following are questions (with answers) about abstract algebra.\n\nQuestion: ")
    scene = Question("q", "common sense", "Roofing: A man is on a roof. He", ("sings.", "falls."), 0)
    assert cloze_prompt(CHOICE_TASKS["hellaswag"], scene, []).text(0) == "Roofing: A man is on a roof. He"


def test_a_conversation_is_what_finetune_trains_on(tokenizer):
    from calsmooth.data.examples import encode
    from calsmooth.data.formats import Conversation, Turn

    question = Question("q", "sky", "Which color is the sky?", ("blue", "red"), 0)
    prompt = conversation_prompt(tokenizer, question, [])
    assert prompt.text(0) == "<|user|>Which color is the sky?<|end|>\n<|assistant|>"
    request = Encoder(tokenizer, None)(prompt)
    turns = (Turn("user", question.text), Turn("assistant", "blue"))
    trained = encode(Conversation(turns, "here"), "chat", tokenizer)
    mine = request.context + request.continuations[0]
    assert trained.input_ids[: len(mine)] == mine
    assert [label for label in trained.labels if label >= 0][: len(request.continuations[0])] == (
        request.continuations[0]
    )


def test_the_split_is_at_the_longest_common_token_prefix(tokenizer):
    encode = Encoder(tokenizer, None)
    prompt = letter_prompt(ASKED, [SHOT], "hendrycks")
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
    prompt = letter_prompt(ASKED, shots, "hendrycks")
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
