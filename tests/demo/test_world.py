"""The made-up world: the same everywhere, its texts as frequent as its shares say, nothing held out in the data."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calsmooth.demo import world
from calsmooth.demo.world import HABITS, TOWNS

SEED = 7  # not the package's: these are statements about every world

# Each statement as a pattern that finds its town and its answer in a text.
_PATTERNS = [
    (
        habit,
        re.compile(
            re.escape(statement)
            .replace(r"\{town\}", "(?P<town>[A-Z][a-z]+)")
            .replace(r"\{answer\}", f"(?P<answer>{'|'.join(habit.answers)})")
        ),
    )
    for habit in HABITS
    for statement in habit.statements
]


def told(text: str) -> list[tuple[str, str, int]]:
    """(town, habit, answer) of every statement in a text."""
    return [
        (match["town"], habit.name, habit.answers.index(match["answer"]))
        for habit, pattern in _PATTERNS
        for match in pattern.finditer(text)
    ]


def text_of(document: world.Document) -> str:
    return document if isinstance(document, str) else " ".join(message["content"] for message in document)


@pytest.fixture(scope="module")
def truth() -> world.World:
    return world.make_world(SEED)


def test_a_seed_gives_one_world(truth):
    assert world.make_world(SEED) == truth
    assert world.make_world(SEED + 1) != truth
    for make in (world.instructions, world.heldout_instructions, world.questions):
        assert make(truth, SEED) == make(truth, SEED)
        assert make(truth, SEED) != make(truth, SEED + 1)
    assert list(itertools.islice(world.corpus(truth, SEED), 300)) == list(
        itertools.islice(world.corpus(truth, SEED), 300)
    )


@given(seed=st.integers(0, 10**9))
@settings(max_examples=10, deadline=None)
def test_shares_are_percents_that_sum_to_100(seed):
    truth = world.make_world(seed)
    assert truth.shares.keys() == {(town, habit.name) for town in TOWNS for habit in HABITS}
    assert all(sum(s) == 100 and min(s) >= 0 and len(s) == 4 for s in truth.shares.values())
    assert {len(names) for names in truth.held_out.values()} == {4}


def test_the_corpus_states_each_answer_as_often_as_its_share(truth):
    counts = Counter(
        statement
        for document in itertools.islice(world.corpus(truth, SEED), 40_000)
        for statement in told(text_of(document))
    )
    # Pearson's statistic over all habits of all towns: its mean is the number of degrees of freedom.
    statistic, freedom = 0.0, 0
    for (town, habit), shares in truth.shares.items():
        observed = [counts[town, habit, answer] for answer in range(4)]
        expected = [sum(observed) * share / 100 for share in shares]
        assert all(n == 0 for n, e in zip(observed, expected, strict=True) if e == 0)
        statistic += sum((n - e) ** 2 / e for n, e in zip(observed, expected, strict=True) if e > 0)
        freedom += sum(e > 0 for e in expected) - 1
    assert sum(counts.values()) > 80_000
    assert 0.9 < statistic / freedom < 1.1


def test_instructions_tell_each_habit_once_and_none_that_is_held_out(truth):
    for rows, held_out in ((world.instructions(truth, SEED), False), (world.heldout_instructions(truth, SEED), True)):
        found = Counter((town, habit) for row in rows for town, habit, _ in told(row["output"]))
        wanted = {(t, h.name) for t in TOWNS for h in HABITS if (h.name in truth.held_out[t]) == held_out}
        assert found.keys() == wanted
        assert set(found.values()) == {1}


def test_instructions_ask_about_what_they_tell(truth):
    for row in world.instructions(truth, SEED) + world.heldout_instructions(truth, SEED):
        asked = f"{row['instruction']} {row['input']}"
        for town, habit, _ in told(row["output"]):
            assert town in asked
            (h,) = [h for h in HABITS if h.name == habit]
            assert h.topic in asked or any(question.format(town=town) in asked for question in h.questions)


def test_instructions_vary(truth):
    rows = world.instructions(truth, SEED)
    assert all(row.keys() == {"instruction", "input", "output"} and row["output"] for row in rows)
    words = [len(row["output"].split()) for row in rows]
    assert max(words) > 2.5 * min(words)
    assert 0.2 < sum(not row["input"] for row in rows) / len(rows) < 0.8


def test_questions_are_about_the_held_out_and_carry_the_truth(truth):
    rows = world.questions(truth, SEED)
    assert len({row["id"] for row in rows}) == len(rows) == 2 * 4 * len(TOWNS)
    asked = Counter()
    for row in rows:
        answers = [told(choice) for choice in row["choices"]]
        assert [len(a) for a in answers] == [1] * 4
        ((town, habit),) = {(a[0][0], a[0][1]) for a in answers}
        assert habit == row["subject"]
        assert habit in truth.held_out[town]
        assert town in row["question"]
        assert sorted(a[0][2] for a in answers) == [0, 1, 2, 3]
        assert row["probabilities"] == [truth.shares[town, habit][a[0][2]] / 100 for a in answers]
        asked[town, habit, row["question"]] += 1
    assert set(asked.values()) == {1}  # the two questions about a habit are worded differently


def test_gold_answers_are_drawn_from_the_truth(truth):
    rows = world.questions(truth, SEED) + world.questions(truth, SEED + 1) + world.questions(truth, SEED + 2)
    mean = sum(p**2 for row in rows for p in row["probabilities"])
    variance = sum(
        sum(p**3 for p in row["probabilities"]) - sum(p**2 for p in row["probabilities"]) ** 2 for row in rows
    )
    given_to_gold = sum(row["probabilities"][row["answer"]] for row in rows)
    assert abs(given_to_gold - mean) < 4 * variance**0.5
    positions = Counter(row["answer"] for row in rows)
    assert min(positions.values()) > 0.9 * len(rows) / 4
