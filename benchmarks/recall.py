"""Recall tasks: what was said far back in a prompt, asked for at its end.

The wordings are some of those in ``training/synthetic.py``, so that the bundled model knows the
form. A pass key in filler: Mohtashami and Jaggi (2023); several needles and chained facts: RULER
(Hsieh et al., 2024).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from training.synthetic import INTRODUCTIONS, NAMES, THINGS, WORDS

from .statistics import wilson_interval

Random = np.random.Generator

REACH = 48
"""Tokens that a line may move, in a long page, to stand after a line's or a sentence's end."""
CUE = 8
"""Tokens of a passage that are said again."""
COPIED = 8
"""Tokens of a passage that the model has to continue with."""
SENTENCE_ENDS = tuple(mark + quote for mark in ".!?" for quote in ("", '"', "”"))


@dataclass(frozen=True)
class Question:
    """A prompt and the tokens that have to follow it."""

    task: str
    depth: float
    """Share of the filler before what is asked for: 0 at the start, 1 before the question."""
    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    chance: float
    """Success rate of a blind guess."""
    num_question_tokens: int
    """Of the prompt, at its end: what is asked, after all that is said."""
    num_stated: int
    """Answers of this kind in the prompt: to give any one of them is right once in so many."""


@dataclass(frozen=True)
class Fact:
    """Lines to hide, each at a depth from 0 to 1, and what is asked about the last of them."""

    lines: list[tuple[float, str]]
    question: str
    answer: str


# -- facts: first one for each depth, these are asked for, then distractors -----------


def passkey(rng: Random, depths: Sequence[float]) -> list[Fact]:
    """A key of five digits."""
    facts = []
    for value, depth in zip(_values(rng, 5, len(depths)), depths, strict=True):
        line = f"The pass key is {value}. Remember it. {value} is the pass key."
        facts.append(Fact([(depth, line)], "What is the pass key? The pass key is ", value))
    return facts


def kv(rng: Random, depths: Sequence[float], count: int = 8) -> list[Fact]:
    """Keys with values of five digits, a pair a line."""
    facts = []
    for word, value, depth in zip(
        _some(rng, WORDS, count), _values(rng, 5, count), _filled(rng, depths, count), strict=True
    ):
        key = f"{word}{rng.integers(10, 100)}"
        facts.append(Fact([(depth, f"{key}: {value}")], f"{key}: ", value))
    return facts


def needles(rng: Random, depths: Sequence[float], count: int = 4) -> list[Fact]:
    """Codes of four digits, one a name."""
    facts = []
    for name, value, depth in zip(
        _some(rng, NAMES, count), _values(rng, 4, count), _filled(rng, depths, count), strict=True
    ):
        said = f"The code of {name} is "
        facts.append(Fact([(depth, f"{said}{value}.")], said, value))
    return facts


def two_hop(rng: Random, depths: Sequence[float], count: int = 3) -> list[Fact]:
    """A code behind a name behind a place; the place is named halfway to the code."""
    facts = []
    for name, place, value, depth in zip(
        _some(rng, NAMES, count),
        _some(rng, THINGS, count),
        _values(rng, 4, count),
        _filled(rng, depths, count),
        strict=True,
    ):
        code = f"The code of {name} is {value}"
        lines = [(depth / 2, f"{name} is in the {place}."), (depth, f"{code}.")]
        facts.append(Fact(lines, f"Who is in the {place}? ", f"{name}. {code}"))
    return facts


def nearest(places: Sequence[int], wanted: int) -> int:
    """The first of the places that are closest to one."""
    return min(places, key=lambda place: abs(place - wanted))


def _values(rng: Random, num_digits: int, count: int) -> list[str]:
    """Different numbers without a leading zero."""
    smallest = 10 ** (num_digits - 1)
    drawn = rng.choice(9 * smallest, size=count, replace=False)
    return [str(smallest + int(value)) for value in drawn]


def _some(rng: Random, options: Sequence[str], count: int) -> list[str]:
    """Different ones of the options."""
    return [options[int(i)] for i in rng.choice(len(options), size=count, replace=False)]


def _filled(rng: Random, depths: Sequence[float], count: int) -> list[float]:
    """The depths, and random ones up to ``count``."""
    return [*depths, *rng.random(count - len(depths)).tolist()]


# -- pages ----------------------------------------------------------------------------


class Pages:
    """Filler and a tokenizer, from which prompts of a given size are made."""

    def __init__(self, tokenizer: Any, filler: list[list[int]], num_tokens: int) -> None:
        """See :func:`questions`."""
        bos = tokenizer.bos_token_id
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.bos: list[int] = [] if bos is None else [bos]
        self.newline = self.encode("\n")
        self.width = num_tokens - len(self.bos)
        self.filler = [ids[1:] if self.bos and ids[:1] == self.bos else ids for ids in filler]
        available = sum(map(len, self.filler))
        if available < self.width:
            raise ValueError(
                f"filler of {available} tokens for num_tokens {num_tokens}; "
                f"allowed: {self.width} and more"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def split(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question on a new line, and those of its answer.

        They part where the tokens with and without the answer do: a space before a word is the
        answer's if the tokenizer joins the two, and no token is asked for that it would not make.
        """
        head, whole = self.encode(f"\n{question}"), self.encode(f"\n{question}{answer}")
        same = (a == b for a, b in zip(head, whole, strict=False))
        end = next((i for i, equal in enumerate(same) if not equal), len(head))
        return whole[:end], whole[end:]

    def stretch(self, rng: Random) -> list[int]:
        """Filler for a whole prompt: a random part of a document, or several joined."""
        first = int(rng.integers(len(self.filler)))
        documents = self.filler[first:] + self.filler[:first]
        start = int(rng.integers(max(0, len(documents[0]) - self.width) + 1))
        return list(islice(chain.from_iterable(documents), start, start + self.width))

    def check_room(self, task: str, num_own: int) -> None:
        """Refuse a task whose own tokens would fill more than half of a prompt."""
        if 2 * num_own > self.num_tokens:
            raise ValueError(
                f"num_tokens {self.num_tokens} is too small for {task}; "
                f"allowed: {2 * num_own} and more"
            )

    def insert(
        self, filler: list[int], lines: Iterable[tuple[float, str]]
    ) -> tuple[list[int], dict[str, int]]:
        """The filler with each line put in near its depth, and at which of its tokens.

        A line stands after a line's end, else after a sentence's, else (with none in reach)
        where its depth is; it ends the line before it where the filler does not.
        """
        text = {token: self.tokenizer.decode([token]) for token in set(filler)}
        line_ends = [0]
        sentence_ends = []
        for i, token in enumerate(filler, 1):
            if text[token].endswith("\n"):
                line_ends.append(i)
            elif text[token].endswith(SENTENCE_ENDS):
                sentence_ends.append(i)

        reach = min(REACH, len(filler) // 20)

        def place(depth: float) -> int:
            wanted = round(depth * len(filler))
            for ends in (line_ends, sentence_ends):
                near = [end for end in ends if abs(end - wanted) <= reach]
                if near:
                    return nearest(near, wanted)
            return wanted

        starts_line = set(line_ends)
        places: dict[str, int] = {}
        page: list[int] = []
        start = 0
        for at, line in sorted(((place(depth), line) for depth, line in lines), key=lambda x: x[0]):
            page += filler[start:at]
            if at not in starts_line:
                page += self.newline
                starts_line.add(at)  # for another line at the same place
            page += self.encode(f"{line}\n")
            places[line] = start = at
        return page + filler[start:], places


# -- tasks ----------------------------------------------------------------------------


class Task(Protocol):
    """Makes the questions of a task, one for each depth."""

    def __call__(
        self, name: str, pages: Pages, depths: list[float], rng: Random
    ) -> list[Question]: ...


@dataclass(frozen=True)
class Lookup:
    """Asks for hidden facts; several questions about one page have a prompt each."""

    draw: Callable[[Random, Sequence[float]], list[Fact]]
    chance: float
    num_asked: int = 1
    """Questions about one page."""

    def __call__(self, name: str, pages: Pages, depths: list[float], rng: Random) -> list[Question]:
        """Pages share out the depths so that a page's own are far apart."""
        num_pages = -(-len(depths) // self.num_asked)
        asked = [depths[i::num_pages] for i in range(num_pages)]
        drawn = [self.draw(rng, of) for of in asked]
        # Only a distractor may be dropped for want of room, and never the last.
        least = [facts[: max(len(of), 2)] for facts, of in zip(drawn, asked, strict=True)]
        needed = max(
            self.num_own(pages, facts, len(of)) for facts, of in zip(least, asked, strict=True)
        )
        pages.check_room(name, needed)
        found = []
        for facts, of in zip(drawn, asked, strict=True):
            while 2 * self.num_own(pages, facts, len(of)) > pages.num_tokens:
                facts.pop()
            found += self.ask(name, pages, facts, len(of), rng)
        return found

    def num_own(self, pages: Pages, facts: list[Fact], num_asked: int) -> int:
        """Tokens of a prompt and its answer that are not filler, at most."""
        lines = [line for fact in facts for _, line in fact.lines]
        said = sum(len(pages.newline) + len(pages.encode(f"{line}\n")) for line in lines)
        asked = [pages.split(fact.question, fact.answer) for fact in facts[:num_asked]]
        longest = max(len(question) + len(answer) for question, answer in asked)
        return len(pages.bos) + said + longest

    def ask(
        self, name: str, pages: Pages, facts: list[Fact], num_asked: int, rng: Random
    ) -> list[Question]:
        """A prompt for each of the first ``num_asked`` facts, on one page with all of them."""
        filler = pages.stretch(rng)
        # Places are those of the shortest page; what it leaves free is filler at its end.
        width = pages.num_tokens - self.num_own(pages, facts, num_asked)
        page, places = pages.insert(filler[:width], [line for fact in facts for line in fact.lines])
        found = []
        for fact in facts[:num_asked]:
            question, answer = pages.split(fact.question, fact.answer)
            head = pages.bos + page
            num_more = pages.num_tokens - len(head) - len(question) - len(answer)
            prompt = head + filler[width : width + num_more] + question
            depth = places[fact.lines[-1][1]] / (width + num_more)
            found.append(
                Question(name, depth, prompt, answer, self.chance, len(question), len(facts))
            )
        return found


def copy(name: str, pages: Pages, depths: list[float], rng: Random) -> list[Question]:
    """Says the start of a passage of the filler again, and asks how it went on.

    Raises:
        ValueError: every eight tokens of a page stand in it twice.
    """
    intro = pages.encode(INTRODUCTIONS[0])
    own = len(pages.bos) + len(intro) + CUE + COPIED
    pages.check_room(name, own)
    found = []
    for depth in depths:
        page = pages.stretch(rng)[: pages.num_tokens - own]
        cues = [tuple(page[i : i + CUE]) for i in range(len(page) - CUE + 1)]
        last = len(page) - CUE - COPIED
        times = Counter(cues)
        unique = [i for i in range(last + 1) if times[cues[i]] == 1]
        if not unique:
            raise ValueError(f"filler repeats itself; allowed: {CUE} tokens in a row that do not")
        start = nearest(unique, round(depth * last))
        cue, answer = page[start : start + CUE], page[start + CUE : start + CUE + COPIED]
        prompt = [*pages.bos, *page, *intro, *cue]
        chance = float(len(pages.tokenizer)) ** -COPIED
        num_asked = len(intro) + len(cue)
        found.append(Question(name, start / last, prompt, answer, chance, num_asked, 1))
    return found


TASKS: dict[str, Task] = {
    "passkey": Lookup(passkey, chance=1 / 90_000),
    "kv": Lookup(kv, chance=1 / 90_000),
    "needles": Lookup(needles, chance=1 / 9_000, num_asked=4),
    "two_hop": Lookup(two_hop, chance=1 / (len(NAMES) * 9_000)),
    "copy": copy,
}


def questions(
    task: str, tokenizer: Any, filler: list[list[int]], num_tokens: int, count: int, seed: int
) -> list[Question]:
    """Questions of a task by depth, from 0 to 1 in even steps; one alone asks for the middle.

    Args:
        task: one of ``TASKS``.
        tokenizer: the model's, from transformers.
        filler: documents as token ids, with or without BOS, such as ``texts.documents`` gives.
        num_tokens: tokens of every prompt together with its answer, BOS included.
        count: questions.
        seed: of all that is random.

    Raises:
        ValueError: there is no such task, or a size does not fit.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}; allowed: {', '.join(TASKS)}")
    return ask_task(task, TASKS[task], tokenizer, filler, num_tokens, count, seed)


def ask_task(
    name: str,
    task: Task,
    tokenizer: Any,
    filler: list[list[int]],
    num_tokens: int,
    count: int,
    seed: int,
) -> list[Question]:
    """The same of a task that is not in ``TASKS``, or is there otherwise."""
    if count < 1:
        raise ValueError(f"count {count}; allowed: 1 and more")
    depths = np.linspace(0, 1, count).tolist() if count > 1 else [0.5]
    pages = Pages(tokenizer, filler, num_tokens)
    found = task(name, pages, depths, np.random.default_rng(seed))
    return sorted(found, key=lambda question: question.depth)


# -- scores ---------------------------------------------------------------------------


class Decoder(Protocol):
    """What :class:`benchmarks.engines.EngineSide` does here."""

    def tokens(
        self,
        prompts: list[list[int]],
        num_new: int,
        extra_args: list[dict[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Greedy tokens of a batch; ``extra_args`` for a policy, one a prompt."""


def accuracy(asked: Sequence[Question], outputs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Share of outputs that start with the whole answer: of all, and by tenths of the depth.

    Args:
        asked: questions.
        outputs: greedy tokens after each prompt, at least as many as its answer has.

    Raises:
        ValueError: there is no question, or not one output for each.
    """
    tenths: dict[int, list[bool]] = {}
    for question, output in zip(asked, outputs, strict=True):
        right = list(output[: len(question.answer_token_ids)]) == question.answer_token_ids
        tenths.setdefault(min(int(question.depth * 10), 9), []).append(right)
    return _share(list(chain.from_iterable(tenths.values()))) | {
        "by_depth": [
            {"from": tenth / 10, "to": (tenth + 1) / 10} | _share(right)
            for tenth, right in sorted(tenths.items())
        ]
    }


def measure_recall(
    side: Decoder, asked: Sequence[Question], extra_args: list[dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy by task with 95 % intervals, beside chance; all questions in one batch.

    The engine needs room for the longest prompt and the longest answer together. A prompt read
    in one chunk is cut down to the budget at its end: the question sees all of it, every token
    of the answer but the first what is left. Read in several chunks
    (``max_num_batched_tokens`` below its length), most is gone before the question is known.

    Args:
        side: an engine.
        asked: questions.
        extra_args: for a policy, one a question.
    """
    longest = max(len(question.answer_token_ids) for question in asked)
    prompts = [question.prompt_token_ids for question in asked]
    outputs = side.tokens(prompts, longest, extra_args)
    rows: dict[str, list[tuple[Question, list[int]]]] = {}
    for question, output in zip(asked, outputs, strict=True):
        rows.setdefault(question.task, []).append((question, output))
    return {
        task: accuracy([question for question, _ in of], [output for _, output in of])
        | {
            "chance": float(np.mean([question.chance for question, _ in of])),
            "num_stated": float(np.mean([question.num_stated for question, _ in of])),
        }
        for task, of in rows.items()
    }


def _share(right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(right), len(right))
    return {
        "accuracy": sum(right) / len(right),
        "ci_low": low,
        "ci_high": high,
        "count": len(right),
    }
