"""Our prompts against those of others: MMLU's original script, from its published rules, and lm-evaluation-harness."""

import csv
import os

import pytest

from calsmooth.evaluate.prompts import prompter
from calsmooth.evaluate.tasks import CHOICE_TASKS


def test_all_mmlu_prompts_are_the_original_scripts(external_data):
    """Built from the rules that the script's authors publish: nothing of ours but the text that is compared.

    A subject's header has a space before each of its words and one in the template; an example is the question, its
    four options under A to D, and "Answer:"; solved ones end with " X" and an empty line. Five shots from dev.
    """
    folder = external_data / "mmlu"

    def rows(split, subject):
        with open(folder / split / f"{subject}_{split}.csv", encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    def example(row, solved):
        text = row[0]
        for letter, option in zip("ABCD", row[1:5], strict=True):
            text = text + "\n" + letter + ". " + option
        text = text + "\nAnswer:"
        return text + " " + row[5] + "\n\n" if solved else text

    task = CHOICE_TASKS["mmlu"]
    data = task.load(external_data, 5)
    _, ask = prompter(task, format="letter", style="hendrycks", chat=None, tokenizer=None)
    ours = {}
    for question in data.questions:
        prompt = ask(question, data.examples[question.subject])
        ours[question.id] = [(prompt.text(k) + prompt.continuations[question.answer]).encode() for k in (5, 0)]

    compared = 0
    for file in sorted(os.listdir(folder / "test")):
        subject = file[: -len("_test.csv")]
        about = "".join(" " + word for word in subject.split("_"))
        header = "The following are multiple choice questions (with answers) about " + about + ".\n\n"
        shots = "".join(example(row, solved=True) for row in rows("dev", subject)[:5])
        for number, row in enumerate(rows("test", subject)):
            asked, answer = example(row, solved=False), " " + row[5]
            expected = [(header + before + asked + answer).encode() for before in (shots, "")]
            assert ours[f"{subject}/{number}"] == expected
            compared += 1
    assert compared == len(data.questions) == 14042


# What each of our tasks is called there, with the format and the style in which it is asked there.
THERE = {
    "mmlu": ("mmlu_anatomy", "letter"),
    "hellaswag": ("hellaswag", "cloze"),
    "arc_easy": ("arc_easy", "cloze"),
    "arc_challenge": ("arc_challenge", "cloze"),
    "openbookqa": ("openbookqa", "cloze"),
    "commonsense_qa": ("commonsense_qa", "letter"),
    "piqa": ("piqa", "cloze"),
    "winogrande": ("winogrande", "cloze"),
    "truthfulqa_mc1": ("truthfulqa_mc1", "cloze"),
}
CASES = [*((name, *there) for name, there in THERE.items()), ("mmlu", "mmlu_anatomy_continuation", "cloze")]


@pytest.fixture(scope="module")
def manager():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (pip install lm_eval) isn't installed")
    from lm_eval.tasks import TaskManager

    return TaskManager()  # finds all tasks that there are, which takes a while


@pytest.fixture
def harness(manager, served, hub, monkeypatch):
    """lm-evaluation-harness's own task of a name, on the rows of `hub`; its shots are the first rows."""
    from lm_eval.api.samplers import FirstNSampler

    rows = {s: [r for r in part if r["subject"] == "anatomy"] for s, part in hub["cais/mmlu", "all"].items()}
    monkeypatch.setitem(hub, ("cais/mmlu", "anatomy"), rows)

    def load(name):
        task = manager.load([name])["tasks"][name]
        task.sampler = FirstNSampler(list(task.fewshot_docs()))
        return task

    return load


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("chat", [None, "turns", "text"])
@pytest.mark.parametrize(("name", "there", "format"), CASES, ids=[f"{c[1]}-{c[2]}" for c in CASES])
def test_prompts_are_lm_evaluation_harnesss(harness, tokenizer, name, there, format, chat, shots):
    if name == "truthfulqa_mc1" and shots:
        pytest.skip("has no split for solved examples; ours are held back from those that are scored")
    ours, theirs = CHOICE_TASKS[name], harness(there)
    data = ours.load(None, shots)
    questions = [q for q in data.questions if name != "mmlu" or q.subject == "anatomy"]
    _, ask = prompter(ours, format=format, style="lm-eval", chat=chat, tokenizer=tokenizer)
    docs = list(theirs.eval_docs)
    assert len(docs) == len(questions) > 3

    def template(messages, add_generation_prompt):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    for question, doc in zip(questions, docs, strict=True):
        context = theirs.fewshot_context(
            doc,
            shots,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat == "turns",
            chat_template=template if chat else None,
        )
        requests = theirs.construct_requests(doc, context, apply_chat_template=chat is not None)
        expected = [request.arguments for request in requests]
        prompt = ask(question, data.examples.get(question.subject, ()))
        openings = prompt.openings or [""] * len(prompt.continuations)
        got = [(prompt.text(shots) + o, c) for o, c in zip(openings, prompt.continuations, strict=True)]
        if name == "truthfulqa_mc1":
            expected, got = sorted(expected), sorted(got)  # ours are shuffled
        assert got == expected
