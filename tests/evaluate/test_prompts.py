"""Prompts as text: the published wordings byte for byte, and the same questions as a chat."""

import shutil

import pytest

from calsmooth.errors import CalsmoothError, UsageError
from calsmooth.evaluate.prompts import Chat, cloze, letters, plain_prompt, prompter
from calsmooth.evaluate.questions import Question
from calsmooth.evaluate.requests import Encoder
from calsmooth.evaluate.tasks import CHOICE_TASKS

ASKED = Question("q", "abstract_algebra", " What is 1 + 1? ", ("one", "two", "None", "NA"), 1)
SHOT = Question("s", "abstract_algebra", "What is 0 + 1?", ("zero", "one", "two", "three"), 1)
BLANK = Question("w", "common sense", "Sarah thanked Maria, so _ smiled.", ("Sarah", "Maria"), 1)
FILLED = Question("x", "common sense", "The ball hit the cup and _ broke.", ("the ball", "the cup"), 1)


def by_letter(style, question=ASKED, examples=(SHOT,), task="mmlu"):
    return plain_prompt(letters(CHOICE_TASKS[task], style), question, examples)


def by_text(task, question, examples=()):
    return plain_prompt(cloze(CHOICE_TASKS[task]), question, examples)


def test_the_original_mmlu_prompt():
    prompt = by_letter("hendrycks")
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
    assert prompt.answer_bytes is None


def test_the_lm_eval_prompt_has_one_space_and_a_stripped_question():
    text = by_letter("lm-eval").text(1)
    assert text.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\nWhat")
    assert "\n\nWhat is 1 + 1?\nA. one\n" in text


def test_letters_follow_the_number_of_choices():
    five = Question("q", "science", "Which?", ("a", "b", "c", "d", "e"), 4)
    assert by_letter("hendrycks", five, ()).continuations[-1] == " E"
    three = Question("q", "science", "Which?", ("a", "b", "c"), 0)
    assert len(by_letter("hendrycks", three, ()).continuations) == 3


def test_cloze_prompts():
    arc = by_text("arc_easy", ASKED, [SHOT])
    assert arc.text(1) == "Question: What is 0 + 1?\nAnswer: one\n\nQuestion:  What is 1 + 1? \nAnswer:"
    assert arc.continuations == (" one", " two", " None", " NA")
    assert arc.answer_bytes == (3, 3, 4, 2)
    mmlu = by_text("mmlu", ASKED)
    assert mmlu.text(0) == (
        "The following are questions (with answers) about abstract algebra.\n\nQuestion: What is 1 + 1?\nAnswer:"
    )
    scene = Question("q", "common sense", "Roofing: A man is on a roof. He", ("sings.", "falls."), 0)
    assert by_text("hellaswag", scene).text(0) == "Roofing: A man is on a roof. He"


def test_winogrande_scores_the_rest_behind_each_option():
    prompt = by_text("winogrande", BLANK, [FILLED])
    assert prompt.text(1) == "The ball hit the cup and the cup broke.\n\nSarah thanked Maria, so "
    assert prompt.openings == ("Sarah", "Maria")
    assert prompt.continuations == (" smiled.", " smiled.")
    assert prompt.answer_bytes == (7, 7)
    assert (
        by_letter("hendrycks", BLANK, (), "winogrande")
        .text(0)
        .endswith("Sarah thanked Maria, so _ smiled.\nA. Sarah\nB. Maria\nAnswer:")
    )


def test_a_conversation_is_what_finetune_trains_on(tokenizer):
    from calsmooth.data.examples import encode
    from calsmooth.data.formats import Conversation, Turn

    question = Question("q", "sky", "Which color is the sky?", ("blue", "red"), 0)
    name, ask = prompter(CHOICE_TASKS["demo"], format="cloze", style="hendrycks", chat=None, tokenizer=tokenizer)
    assert name == "conversation"
    prompt = ask(question, [])
    assert prompt.text(0) == "<|user|>Which color is the sky?<|end|>\n<|assistant|>"
    request = Encoder(tokenizer, None)(prompt)
    turns = (Turn("user", question.text), Turn("assistant", "blue"))
    trained = encode(Conversation(turns, "here"), "chat", tokenizer)
    mine = request.context + request.continuations[0]
    assert trained.input_ids[: len(mine)] == mine
    assert [label for label in trained.labels if label >= 0][: len(request.continuations[0])] == (
        request.continuations[0]
    )


def chat(tokenizer, task, shots_as="turns", format="letter"):
    return prompter(CHOICE_TASKS[task], format=format, style="lm-eval", chat=shots_as, tokenizer=tokenizer)


HEADER = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
FIRST = "What is 0 + 1?\nA. zero\nB. one\nC. two\nD. three\nAnswer:"
SECOND = "What is 1 + 1?\nA. one\nB. two\nC. None\nD. NA\nAnswer:"


def test_chat_with_shots_as_turns(tokenizer):
    name, ask = chat(tokenizer, "mmlu")
    prompt = ask(ASKED, [SHOT])
    assert name == "lm-eval"
    assert prompt.text(1) == (
        f"<|system|>{HEADER}<|end|>\n<|user|>{FIRST}<|end|>\n<|assistant|>B<|end|>\n"
        f"<|user|>{SECOND}<|end|>\n<|assistant|>"
    )
    assert prompt.text(0) == f"<|system|>{HEADER}<|end|>\n<|user|>{SECOND}<|end|>\n<|assistant|>"
    assert prompt.continuations == ("A", "B", "C", "D")
    assert not prompt.special_tokens


def test_chat_with_shots_as_text(tokenizer):
    prompt = chat(tokenizer, "mmlu", "text")[1](ASKED, [SHOT])
    assert prompt.text(1) == (f"<|system|>{HEADER}<|end|>\n<|user|>{FIRST} B\n\n{SECOND}<|end|>\n<|assistant|>")


def test_chat_cloze_with_contexts_that_part(tokenizer):
    name, ask = chat(tokenizer, "winogrande", format="cloze")
    prompt = ask(BLANK, [FILLED])
    assert name == "conversation"
    shot = "<|user|>The ball hit the cup and the cup<|end|>\n<|assistant|>broke.<|end|>\n"
    for opening, option in zip(prompt.openings, BLANK.choices, strict=True):
        asked = f"<|user|>Sarah thanked Maria, so {option}<|end|>\n<|assistant|>"
        assert prompt.text(1) + opening == shot + asked
        assert prompt.text(0) + opening == asked
    assert prompt.continuations == ("smiled.", "smiled.")


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
THINKS = (
    "{% for m in messages %}[{{ m.role }}] {% if loop.last and m.role == 'assistant' %}<think></think> {% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def templated(tokenizer, monkeypatch):
    def use(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return use


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_without_a_system_turn_the_first_user_turn_has_its_text(templated, template):
    prompt = chat(templated(template), "mmlu")[1](ASKED, [SHOT])
    assert prompt.text(1) == f"[user] {HEADER}{FIRST}\n[assistant] B\n[user] {SECOND}\n[assistant] "
    assert prompt.text(0) == f"[user] {HEADER}{SECOND}\n[assistant] "


def test_what_a_template_writes_before_the_answer_is_context(templated):
    prompt = chat(templated(THINKS), "arc_easy", format="cloze")[1](ASKED, [SHOT])
    assert prompt.text(1).endswith("[user] Question:  What is 1 + 1? \nAnswer:\n[assistant] <think></think> ")
    assert prompt.text(1).count("<think>") == 1
    assert prompt.continuations[0] == "one"


def test_a_tokenizer_without_a_chat_template_is_refused(templated):
    with pytest.raises(UsageError, match=r"^--chat-template: .* has no chat template; leave the flag out$"):
        chat(templated(None), "mmlu")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no thanks') }}",
            r"question q: the chat template refuses this conversation \(no thanks\)",
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "question q: the chat template doesn't write"),
    ],
)
def test_a_template_that_does_not_fit_is_an_error(templated, template, message):
    with pytest.raises(CalsmoothError, match=message):
        Chat(templated(template), "chat").prompt(cloze(CHOICE_TASKS["arc_easy"]), ASKED, [])


def test_a_missing_chat_template_shows_before_the_model_is_loaded(model_folder, tmp_path, monkeypatch):
    from calsmooth.evaluate import run as run_module
    from calsmooth.evaluate.config import EvaluateConfig

    folder = tmp_path / "base"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()

    def never(*arguments, **named):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_module, "load_model", never)
    with pytest.raises(UsageError, match="--chat-template: this model's tokenizer has no chat template"):
        run_module.run(EvaluateConfig(model=str(folder), chat_template=True, output=tmp_path / "out"))
