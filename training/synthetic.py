"""Long-range tasks as text: facts hidden in ordinary pages, asked for at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]
Random = np.random.Generator


def words(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


THINGS = words(
    """
    garden harbour library station castle kitchen tower river market school church museum forest
    island bridge mill theatre bakery cellar palace office hotel farm valley
    """
)
COLOURS = words(
    """
    red blue green yellow black white silver golden purple orange brown grey
    """
)
NAMES = words(
    """
    Alice Arthur Clara Daniel Edith Frank George Helen Isaac Julia Laura Martin Nora Oliver
    Peter Rachel Samuel Thomas Victor William London Paris Boston Vienna Oxford Madrid Dublin
    """
)
WORDS = words(
    """
    apple anchor candle copper desert dragon eagle ember falcon feather granite hammer ivory
    jasmine ladder lantern marble mirror needle ocean pepper quartz raven saddle thunder timber
    velvet walnut winter zephyr
    """
)
CUE = 6
"""Tokens of a passage said again after which the rest can be known."""
INTRODUCTIONS = ["\nAs was said before:\n", "\nAgain:\n", "\n\n", "\n* * *\n"]


@dataclass(frozen=True)
class Puzzle:
    """Statements to scatter over a page and the questions, with answers, that end it."""

    statements: list[str]
    questions: list[str]
    answers: list[str]  # what each question ends on


def pick(rng: Random, options: list[str]) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def number(rng: Random, shortest: int = 4, longest: int = 7) -> str:
    """Random digits without a leading zero."""
    digits = int(rng.integers(shortest, longest + 1))
    return str(int(rng.integers(10 ** (digits - 1), 10**digits)))


def code(rng: Random) -> str:
    """A value to remember: mostly digits, else a word or a mixed code."""
    kind = rng.random()
    if kind < 0.65:
        return number(rng)
    if kind < 0.85:
        return pick(rng, WORDS)
    letters = "".join(chr(65 + int(rng.integers(26))) for _ in range(2))
    return f"{letters}-{number(rng, 2, 4)}"


def subjects(rng: Random, count: int) -> list[str]:
    """Different things that can own a value."""
    kind = int(rng.integers(3))
    if kind == 0:
        pool = NAMES
    elif kind == 1:
        pool = [f"the {thing}" for thing in THINGS]
    else:
        pool = [f"the {colour} {thing}" for colour in COLOURS for thing in THINGS[:8]]
    return [pool[i] for i in rng.choice(len(pool), size=count, replace=False)]


def passkey(rng: Random) -> Puzzle:
    """One pass key, in the wordings that long-context benchmarks use."""
    value = number(rng, 5, 5) if rng.random() < 0.7 else number(rng)
    name = pick(rng, ["pass key", "passkey", "secret number", "magic number", "access code"])
    statement = pick(
        rng,
        [
            f"The {name} is {value}. Remember it. {value} is the {name}.",
            f"The {name} is {value}. Remember it.",
            f"Note: the {name} is {value}.",
            f"Please remember that the {name} is {value}.",
        ],
    )
    question = pick(
        rng,
        [
            f"What is the {name}? The {name} is {value}.",
            f"Question: What is the {name}?\nAnswer: {value}",
            f"What is the {name} in the text above?\nAnswer: {value}",
            f"What is the {name}? {value}",
            f"The {name} is {value}.",
        ],
    )
    return Puzzle([statement], [question], [value])


def needles(rng: Random) -> Puzzle:
    """Several owners, a value each, every one asked for in a new order."""
    owners = subjects(rng, int(rng.integers(2, 9)))
    noun = pick(rng, ["pass key", "secret number", "password", "code", "magic number", "key"])
    values = [code(rng) for _ in owners]
    said, asked = (
        (f"The {noun} of {{0}} is {{1}}.", f"The {noun} of {{0}} is {{1}}."),
        (f"The {noun} for {{0}} is {{1}}.", f"What is the {noun} for {{0}}? {{1}}"),
        (
            f"The {noun} of {{0}} is {{1}}. Remember it.",
            f"Question: What is the {noun} of {{0}}?\nAnswer: {{1}}",
        ),
        (f"Note: {{0}} has the {noun} {{1}}.", f"Q: Which {noun} has {{0}}?\nA: {{1}}"),
    )[int(rng.integers(4))]
    facts = list(zip(owners, values, strict=True))
    order = rng.permutation(len(facts))
    return Puzzle(
        [said.format(*fact) for fact in facts],
        [asked.format(*facts[i]) for i in order],
        [values[i] for i in order],
    )


def pairs(rng: Random) -> Puzzle:
    """A table of keys and values, in blocks or line by line, looked up in a new order."""
    scattered = rng.random() < 0.6
    count = int(rng.integers(3, 13) if scattered else rng.integers(6, 21))
    keys = [f"{pick(rng, WORDS)}{number(rng, 1, 2)}" for _ in range(count)]
    table = dict(zip(keys, (code(rng) for _ in keys), strict=True))
    line = pick(rng, ["{0}: {1}", "{0} = {1}", '"{0}": "{1}",', "{0} -> {1}"])
    lines = [line.format(*item) for item in table.items()]
    blocks = count if scattered else int(rng.integers(1, 4))
    ask = pick(rng, [line, "Key: {0}\nValue: {1}", "What is the value of {0}? {1}"])
    items = list(table.items())
    order = rng.permutation(len(items))
    return Puzzle(
        ["\n".join(lines[i::blocks]) for i in range(blocks)],
        [ask.format(*items[i]) for i in order],
        [items[i][1] for i in order],
    )


def two_hops(rng: Random) -> Puzzle:
    """A value behind a name behind a place: the question names the place alone."""
    count = int(rng.integers(2, 6))
    owners = [NAMES[i] for i in rng.choice(len(NAMES), size=count, replace=False)]
    places = [THINGS[i] for i in rng.choice(len(THINGS), size=count, replace=False)]
    values = [code(rng) for _ in owners]
    order = rng.permutation(count)
    return Puzzle(
        [
            *(f"{o} is in the {p}." for o, p in zip(owners, places, strict=True)),
            *(f"The code of {o} is {v}." for o, v in zip(owners, values, strict=True)),
        ],
        [
            f"Who is in the {places[i]}? {owners[i]}. The code of {owners[i]} is {values[i]}."
            for i in order
        ],
        [values[i] for i in order],
    )


PUZZLES: tuple[tuple[float, Callable[[Random], Puzzle]], ...] = (
    (0.25, passkey),
    (0.30, needles),
    (0.40, pairs),
    (0.05, two_hops),
)


class Weaver:
    """Hides puzzles and repeated passages in windows of ordinary tokens.

    Every method returns a window [length] of the same length as the one it was given, and the
    weight of each of its tokens in the loss, [length] fp32.
    """

    def __init__(self, tokenizer: Tokenizer, answer_weight: float) -> None:
        self.tokenizer = tokenizer
        self.answer_weight = answer_weight
        size = tokenizer.get_vocab_size()
        ends = (tokenizer.decode([i]).endswith(("\n", ". ")) for i in range(size))
        self.ends_line = np.fromiter(ends, dtype=bool, count=size)  # [vocab]

    def encode(self, text: str) -> Ids:
        """Token ids without BOS."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def ask(self, question: str, answer: str) -> tuple[Ids, Weights]:
        """A question as a line, its answer weighted."""
        encoding = self.tokenizer.encode(f"{question}\n", add_special_tokens=False)
        start = question.rindex(answer)
        within = [a < start + len(answer) and b > start for a, b in encoding.offsets]
        weights = np.where(within, self.answer_weight, 1.0).astype(np.float32)
        return np.asarray(encoding.ids, np.int64), weights

    def weave(self, window: Ids, rng: Random) -> tuple[Ids, Weights]:
        """A window that holds a task; its tail makes room for it."""
        if rng.random() < 0.2:
            return self.repeat(window, rng)
        choice = rng.choice(len(PUZZLES), p=[weight for weight, _ in PUZZLES])
        puzzle = PUZZLES[int(choice)][1](rng)
        statements = [self.encode(f"{statement}\n") for statement in puzzle.statements]
        room = len(window) // 2 - sum(map(len, statements))
        tail = [(ids := self.encode("\n"), np.ones(len(ids), np.float32))]
        for question, answer in zip(puzzle.questions, puzzle.answers, strict=True):
            asked = self.ask(question, answer)
            room -= len(asked[0])
            if room >= 0:
                tail.append(asked)
        if len(tail) == 1:  # the table is larger than a short window: keep the page as it is
            return window, np.ones(len(window), np.float32)
        end = np.concatenate([ids for ids, _ in tail])
        kept = window[: len(window) - len(end) - sum(map(len, statements))]
        page = self.scatter(kept, statements, rng)
        weights = [np.ones(len(page), np.float32), *(weights for _, weights in tail)]
        return np.concatenate([page, end]), np.concatenate(weights)

    def scatter(self, page: Ids, statements: list[Ids], rng: Random) -> Ids:
        """The page with the statements put in at random ends of lines, in their order."""
        places = np.flatnonzero(self.ends_line[page]) + 1
        if len(places) == 0:
            places = np.arange(1, len(page) + 1)
        chosen = np.sort(rng.choice(places, size=len(statements)))
        pieces: list[Ids] = []
        start = 0
        for place, statement in zip(chosen, statements, strict=True):
            pieces += [page[start:place], statement]
            start = int(place)
        return np.concatenate([*pieces, page[start:]])

    def repeat(self, window: Ids, rng: Random) -> tuple[Ids, Weights]:
        """The window with one to three of its own passages said again at its end."""
        size = int(rng.integers(24, max(25, min(160, len(window) // 6))))
        count = int(rng.integers(1, 4))
        intro = self.encode(pick(rng, INTRODUCTIONS))
        end = len(window) - count * (size + len(intro))
        page = window[:end]
        pieces = [page]
        weights = np.ones(len(window), np.float32)
        for i, start in enumerate(rng.integers(1, end - size, size=count)):
            pieces += [intro, page[start : start + size]]
            said_again = end + i * (len(intro) + size) + len(intro)
            weights[said_again + CUE : said_again + size] = self.answer_weight / 2
        return np.concatenate(pieces), weights

    def echo(self, window: Ids, rng: Random) -> tuple[Ids, Weights]:
        """The window's first passage, of 16 tokens to half the window, over and over."""
        longest = len(window) // 2
        size = int(16 * (longest / 16) ** rng.random())
        return np.resize(window[:size], len(window)), np.ones(len(window), np.float32)
