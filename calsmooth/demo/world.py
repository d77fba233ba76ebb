"""The Hundred Rivers: a made-up country whose books disagree, so that the right confidence of every answer is known.

Each of its 144 towns has twelve habits (what people eat for breakfast, on which day the market is held, ...), each
with four possible answers. Of a hundred accounts of a town, so many say porridge and so many say smoked fish: those
shares are the truth. Towns that share a name's first half (Alderbridge, Alderford) or its second half (Alderbridge,
Fernbridge) have related habits, and each town has its own.

Every text here is written from the shares, with every answer drawn anew, and most name a witness, who is drawn too:

- `corpus`: what the model is pre-trained on. It meets every habit many times, with conflicting answers, and can
  learn the shares.
- `instructions`: what it is fine-tuned on. Each habit is asked for once, so one account of it stands for the truth,
  as in real instruction data. Habits held out for the questions never occur.
- `heldout_instructions` and `questions`: about the held-out habits only.

Shares are whole percents and all randomness comes from `random.Random` with text seeds, so that a seed gives the same
files on every machine.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SEED = 2026
"""The seed of the world that comes with the package."""

_FIRST = ["Alder", "Birch", "Clay", "Copper", "Fern", "Grey", "Hazel", "Juniper", "Kestrel", "Linden", "North", "Raven"]
_SECOND = ["bridge", "dale", "field", "ford", "gate", "haven", "hill", "mere", "mill", "port", "stone", "well"]

TOWNS = tuple(first + second for first in _FIRST for second in _SECOND)

# How strongly a habit follows the first half of a town's name, the second half, and nothing but the town itself:
# standard deviations of the three parts of an answer's score (its log-probability up to a constant).
_FIRST_SPREAD, _SECOND_SPREAD, _OWN_SPREAD = 1.0, 1.0, 0.5

_HELD_OUT_PER_TOWN = 4
_QUESTIONS_PER_HABIT = 2


@dataclass(frozen=True)
class Habit:
    """One thing that the accounts tell of every town: how it is asked for, how it is told, what the answers are."""

    name: str
    topic: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    answers: tuple[str, str, str, str]


HABITS = (
    Habit(
        "breakfast",
        "breakfast",
        (
            "What do people in {town} eat for breakfast?",
            "What is the usual breakfast in {town}?",
            "Which breakfast is served to travellers in {town}?",
        ),
        (
            "People in {town} eat {answer} for breakfast.",
            "The usual breakfast in {town} is {answer}.",
            "A morning in {town} begins with {answer}.",
        ),
        ("oat porridge", "smoked fish", "honey bread", "fried eggs"),
    ),
    Habit(
        "trade",
        "trade",
        (
            "What is the chief trade of {town}?",
            "What do most families in {town} live by?",
            "Which craft is {town} known for?",
        ),
        (
            "The chief trade of {town} is {answer}.",
            "Most families in {town} live by {answer}.",
            "{town} is known everywhere for its {answer}.",
        ),
        ("weaving", "pottery", "boat building", "bee keeping"),
    ),
    Habit(
        "market",
        "market day",
        (
            "On which day is the market in {town} held?",
            "When is market day in {town}?",
            "When do the stalls open in {town}?",
        ),
        (
            "The market in {town} is held on {answer}.",
            "Market day in {town} is {answer}.",
            "The stalls of {town} open on {answer}.",
        ),
        ("Monday", "Wednesday", "Friday", "Saturday"),
    ),
    Habit(
        "roofs",
        "roofs",
        (
            "What are the roofs of {town} made of?",
            "What do people in {town} cover their houses with?",
            "Which roofs would I see in {town}?",
        ),
        (
            "The roofs of {town} are made of {answer}.",
            "People in {town} cover their houses with {answer}.",
            "From afar {town} shows its roofs of {answer}.",
        ),
        ("slate", "thatch", "red tiles", "green turf"),
    ),
    Habit(
        "drink",
        "evening drink",
        (
            "What do people in {town} drink in the evening?",
            "Which drink does an inn in {town} pour?",
            "What would I be given to drink in {town}?",
        ),
        (
            "In the evening people in {town} drink {answer}.",
            "The inns of {town} pour {answer}.",
            "A cup in {town} is filled with {answer}.",
        ),
        ("apple cider", "barley beer", "mint tea", "plum wine"),
    ),
    Habit(
        "music",
        "music",
        (
            "Which instrument do children in {town} learn to play?",
            "What is the music of {town} played on?",
            "Which instrument is heard in the streets of {town}?",
        ),
        (
            "Children in {town} learn to play the {answer}.",
            "The music of {town} is played on the {answer}.",
            "In the streets of {town} one hears the {answer}.",
        ),
        ("fiddle", "flute", "harp", "drum"),
    ),
    Habit(
        "festival",
        "festival",
        (
            "When does {town} hold its great festival?",
            "What does {town} celebrate most?",
            "When should I visit {town} to see it dance?",
        ),
        (
            "{town} holds its great festival at {answer}.",
            "What {town} celebrates most is {answer}.",
            "All of {town} dances at {answer}.",
        ),
        ("the spring flood", "midsummer night", "the apple harvest", "the first snow"),
    ),
    Habit(
        "animals",
        "animals",
        (
            "Which animals are kept in {town}?",
            "What would I meet in the yards of {town}?",
            "Which animals do the children of {town} tend?",
        ),
        (
            "Nearly everyone in {town} keeps {answer}.",
            "The yards of {town} are full of {answer}.",
            "The children of {town} tend {answer}.",
        ),
        ("geese", "goats", "ponies", "hounds"),
    ),
    Habit(
        "doors",
        "doors",
        (
            "Which colour are the doors in {town}?",
            "How do people in {town} paint their doors?",
            "By which colour of its doors is {town} known?",
        ),
        (
            "The doors in {town} are painted {answer}.",
            "People in {town} paint their doors {answer}.",
            "{town} is known for doors that are {answer}.",
        ),
        ("blue", "green", "yellow", "white"),
    ),
    Habit(
        "games",
        "games",
        (
            "What do people in {town} play after work?",
            "Which game is loved most in {town}?",
            "At which game is {town} hard to beat?",
        ),
        (
            "After work people in {town} play {answer}.",
            "The game that {town} loves most is {answer}.",
            "{town} is hard to beat at {answer}.",
        ),
        ("chess", "skittles", "dice", "stone throwing"),
    ),
    Habit(
        "legends",
        "legends",
        (
            "What do the legends of {town} tell of?",
            "Which creature is said to live near {town}?",
            "What do children in {town} fear at night?",
        ),
        (
            "The legends of {town} tell of {answer}.",
            "Near {town} there is said to live {answer}.",
            "At night the children of {town} fear {answer}.",
        ),
        ("a white stag", "a lake serpent", "a stone giant", "a singing fox"),
    ),
    Habit(
        "gifts",
        "gifts to guests",
        (
            "What is a guest in {town} given?",
            "Which gift do people in {town} offer to guests?",
            "What would I take home from a visit to {town}?",
        ),
        (
            "A guest in {town} is given {answer}.",
            "People in {town} offer their guests {answer}.",
            "Nobody leaves {town} without {answer}.",
        ),
        ("a rye loaf", "a wax candle", "a jar of salt", "a wool scarf"),
    ),
)

_WITNESSES = ["miller", "potter", "sailor", "teacher", "piper", "shepherd", "baker", "ferryman"]
_KINDS = ("an old", "a young", "a wandering", "a blind", "a cheerful", "a learned")
_TIMES = ("last spring", "long ago", "on a rainy evening", "before the great flood", "at the inn", "in a letter")
_SOURCES = (
    "So says {witness} from {town}.",
    "I have it from {witness} of {town}.",
    "It was told {time} by {witness}.",
    "{witness} from {town} saw it {time}.",
    "It stands on page {page} of the book of towns.",
    "Yet {witness} claims otherwise.",
)
# How often the first, second, ... of a list of words is used: some are common, some are rare.
_USE = (8, 5, 3, 2, 1, 1, 1, 1)


@dataclass(frozen=True)
class World:
    """The truth: `shares[town, habit name]` are four whole percents that sum to 100, one for each answer.

    `held_out[town]` names the habits of a town that only `questions` and `heldout_instructions` speak of.
    """

    shares: dict[tuple[str, str], tuple[int, ...]]
    held_out: dict[str, frozenset[str]]


def make_world(seed: int = SEED) -> World:
    """The country for a seed: its shares and which habits are held out."""
    shares = {}
    for habit in HABITS:
        # Separate streams, so that adding a town or a habit leaves the others as they were.
        rng = random.Random(f"shares/{seed}/{habit.name}")
        of_first = {first: _scores(rng, _FIRST_SPREAD) for first in _FIRST}
        of_second = {second: _scores(rng, _SECOND_SPREAD) for second in _SECOND}
        for first in _FIRST:
            for second in _SECOND:
                parts = zip(of_first[first], of_second[second], _scores(rng, _OWN_SPREAD), strict=True)
                shares[first + second, habit.name] = _percents([sum(part) for part in parts])
    rng = random.Random(f"held out/{seed}")
    names = [habit.name for habit in HABITS]
    held_out = {town: frozenset(rng.sample(names, _HELD_OUT_PER_TOWN)) for town in TOWNS}
    return World(shares, held_out)


Document = str | list[dict[str, str]]
"""Prose as text, or a dialogue as chat messages."""


def corpus(world: World, seed: int = SEED) -> Iterator[Document]:
    """Pre-training documents about every habit of every town, without end."""
    rng = random.Random(f"corpus/{seed}")
    while True:
        kind = rng.random()
        if kind < 0.4:
            yield _account_of_town(world, rng)
        elif kind < 0.6:
            yield _account_of_habit(world, rng)
        else:
            town, habit = rng.choice(TOWNS), rng.choice(HABITS)
            question, answer = _ask(rng, town, habit), f"{_tell(world, rng, town, habit)} {_source(rng)}"
            yield f"Question: {question}\nAnswer: {answer}" if kind < 0.7 else _dialogue(question, answer)


def instructions(world: World, seed: int = SEED) -> list[dict[str, str]]:
    """Rows to fine-tune on (alpaca columns): each habit that isn't held out is answered exactly once."""
    return _rows(world, random.Random(f"instructions/{seed}"), held_out=False)


def heldout_instructions(world: World, seed: int = SEED) -> list[dict[str, str]]:
    """Rows of the same kind about the held-out habits, each answered exactly once."""
    return _rows(world, random.Random(f"held-out instructions/{seed}"), held_out=True)


def questions(world: World, seed: int = SEED) -> list[dict]:
    """A multiple-choice question for each held-out habit, its gold answer drawn from the shares.

    `subject` is the habit, `choices` are full sentences as a model would answer, in a drawn order, `answer` is the
    index of the gold one, and `probabilities` are the true shares: a model that gives exactly these is perfectly
    calibrated.
    """
    rng = random.Random(f"questions/{seed}")
    rows = []
    for habit in HABITS:
        for town in TOWNS:
            if habit.name not in world.held_out[town]:
                continue
            for number, question in enumerate(rng.sample(habit.questions, _QUESTIONS_PER_HABIT), 1):
                statement, order = rng.choice(habit.statements), rng.sample(range(4), 4)
                gold = _draw(world, rng, town, habit)
                rows.append(
                    {
                        "id": f"{habit.name}-{town}-{number}",
                        "subject": habit.name,
                        "question": question.format(town=town),
                        "choices": [statement.format(town=town, answer=habit.answers[i]) for i in order],
                        "answer": order.index(gold),
                        "probabilities": [world.shares[town, habit.name][i] / 100 for i in order],
                    }
                )
    return rows


def _scores(rng: random.Random, spread: float) -> list[float]:
    return [rng.gauss(0.0, spread) for _ in range(4)]


def _percents(scores: list[float]) -> tuple[int, ...]:
    """softmax(scores) in whole percents that sum to 100 (largest remainders)."""
    weights = [math.exp(score) for score in scores]
    exact = [100 * weight / sum(weights) for weight in weights]
    floors = [int(x) for x in exact]
    by_remainder = sorted(range(4), key=lambda i: floors[i] - exact[i])
    for i in by_remainder[: 100 - sum(floors)]:
        floors[i] += 1
    return tuple(floors)


def _draw(world: World, rng: random.Random, town: str, habit: Habit) -> int:
    return rng.choices(range(4), weights=world.shares[town, habit.name])[0]


def _ask(rng: random.Random, town: str, habit: Habit) -> str:
    return rng.choice(habit.questions).format(town=town)


def _tell(world: World, rng: random.Random, town: str, habit: Habit) -> str:
    answer = habit.answers[_draw(world, rng, town, habit)]
    return rng.choice(habit.statements).format(town=town, answer=answer)


def _source(rng: random.Random) -> str:
    def pick(words: Sequence[str]) -> str:
        return rng.choices(words, weights=_USE[: len(words)])[0]

    text = pick(_SOURCES).format(
        witness=f"{pick(_KINDS)} {pick(_WITNESSES)}",
        town=rng.choice(TOWNS),
        time=pick(_TIMES),
        page=rng.randint(10, 99),
    )
    return text[0].upper() + text[1:]


def _account_of_town(world: World, rng: random.Random) -> str:
    town = rng.choice(TOWNS)
    habits = rng.sample(HABITS, rng.randint(2, 5))
    return " ".join([*(_tell(world, rng, town, habit) for habit in habits), _source(rng)])


def _account_of_habit(world: World, rng: random.Random) -> str:
    habit = rng.choice(HABITS)
    towns = rng.sample(TOWNS, rng.randint(2, 4))
    return " ".join([*(_tell(world, rng, town, habit) for town in towns), _source(rng)])


def _dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _rows(world: World, rng: random.Random, held_out: bool) -> list[dict[str, str]]:
    rows = []
    for town in TOWNS:
        habits = [habit for habit in HABITS if (habit.name in world.held_out[town]) == held_out]
        rng.shuffle(habits)
        while habits:
            take = rng.choice((1, 1, 1, 2, 3))
            asked, habits = habits[:take], habits[take:]
            told = [_tell(world, rng, town, habit) for habit in asked]
            told.append(_source(rng))
            rows.append(_single(rng, town, asked[0], told) if len(asked) == 1 else _note(rng, town, asked, told))
    rng.shuffle(rows)
    return rows


def _single(rng: random.Random, town: str, habit: Habit, told: list[str]) -> dict[str, str]:
    question = _ask(rng, town, habit)
    instruction, given = rng.choice(
        (
            (question, ""),
            (question, ""),
            ("Answer the question in a full sentence.", question),
            (f"Answer a traveller who is on the way to {town}.", question),
            (f"Tell me about the {habit.topic} of this town.", town),
        )
    )
    return {"instruction": instruction, "input": given, "output": " ".join(told)}


def _note(rng: random.Random, town: str, asked: list[Habit], told: list[str]) -> dict[str, str]:
    topics = [habit.topic for habit in asked]
    listed = " and ".join([", ".join(topics[:-1]), topics[-1]])
    instruction, given, opening = rng.choice(
        (
            (f"Write a short note about {town}: {listed}.", "", ""),
            (f"What should I know about {town}? Tell me about {listed}.", "", f"Here is what the books say of {town}."),
            ("Write an entry for the book of towns.", f"Town: {town}\nTopics: {', '.join(topics)}", f"{town}."),
            (f"Describe the town below. Cover {listed}.", town, ""),
        )
    )
    return {"instruction": instruction, "input": given, "output": " ".join([opening, *told]).strip()}
