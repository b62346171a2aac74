"""Recall questions: their size, where things stand, and that the answer is in the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import texts
from benchmarks.context import MODEL
from benchmarks.recall import COPIED, CUE, TASKS, Question, accuracy, measure_recall, questions
from training import synthetic

SIZE = 512
# What the text says once in a statement and once more with the question and its answer.
SAID_TWICE = {
    "passkey": r"The pass key is \d{5}$",
    "kv": r"[a-z]+\d\d: \d{5}$",
    "needles": r"The code of \w+ is \d{4}$",
    "two_hop": r"The code of \w+ is \d{4}$",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def filler() -> list[list[int]]:
    names = ("wikitext", "pg19")
    return [ids for name in names for ids in texts.documents(name, str(MODEL), 600)[:30]]


class Copies:
    """Gives every prompt an answer that it was told."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers = answers

    def tokens(
        self, prompts: list[list[int]], num_new: int, extra_args: object = None
    ) -> list[list[int]]:
        return [(self.answers.get(tuple(p), []) + [0] * num_new)[:num_new] for p in prompts]


def parts(tokenizer: Any, question: Question) -> tuple[str, str]:
    """What was read and asked, and the question's last line with its answer."""
    prompt = tokenizer.decode(question.prompt_token_ids)
    whole = tokenizer.decode(question.prompt_token_ids + question.answer_token_ids)
    assert whole.startswith(prompt)
    return prompt, whole.rpartition("\n")[2]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_tokens", [200, SIZE, 600])
def test_prompt_and_answer_have_the_size(
    task: str, num_tokens: int, tokenizer: Any, filler: list[list[int]]
) -> None:
    asked = questions(task, tokenizer, filler, num_tokens, 7, 0)
    assert len(asked) == 7
    for question in asked:
        ids = question.prompt_token_ids + question.answer_token_ids
        assert len(ids) == num_tokens
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert question.task == task
        assert question.answer_token_ids


@pytest.mark.parametrize("task", TASKS)
def test_depths_rise_in_even_steps(task: str, tokenizer: Any, filler: list[list[int]]) -> None:
    depths = [q.depth for q in questions(task, tokenizer, filler, SIZE, 9, 1)]
    assert depths == sorted(depths)
    assert depths[0] == 0
    np.testing.assert_allclose(depths, np.linspace(0, 1, 9), atol=0.06)  # a line's end is near
    (alone,) = questions(task, tokenizer, filler, SIZE, 1, 1)
    assert alone.depth == pytest.approx(0.5, abs=0.06)


def test_the_depth_is_where_the_statement_stands(tokenizer: Any, filler: list[list[int]]) -> None:
    """Of the filler alone: what is said and asked does not count."""
    for question in questions("passkey", tokenizer, filler, SIZE, 5, 3):
        prompt = question.prompt_token_ids
        answer = tokenizer.decode(question.answer_token_ids)
        line = f"The pass key is {answer}. Remember it. {answer} is the pass key.\n"
        said = tokenizer(line, add_special_tokens=False)["input_ids"]
        asked = tokenizer("\nWhat is the pass key? The pass key is ", add_special_tokens=False)
        start = next(i for i in range(len(prompt)) if prompt[i : i + len(said)] == said)
        before = tokenizer.decode(prompt[1:start])
        assert before == "" or before.endswith("\n")
        num_filler = len(prompt) - 1 - len(said) - len(asked["input_ids"])
        # One token less of it, where a line's end had to be put in.
        assert question.depth == pytest.approx((start - 1) / num_filler, abs=1.01 / num_filler)


@pytest.mark.parametrize("task", SAID_TWICE)
def test_the_answer_continues_what_is_asked(
    task: str, tokenizer: Any, filler: list[list[int]]
) -> None:
    for question in questions(task, tokenizer, filler, SIZE, 8, 2):
        prompt, last = parts(tokenizer, question)
        found = re.search(SAID_TWICE[task], last)
        assert found, last
        assert found.group() in prompt
        assert (prompt + tokenizer.decode(question.answer_token_ids)).count(found.group()) == 2


def test_both_hops_are_said(tokenizer: Any, filler: list[list[int]]) -> None:
    for question in questions("two_hop", tokenizer, filler, SIZE, 5, 4):
        prompt, last = parts(tokenizer, question)
        match = re.fullmatch(r"Who is in the (\w+)\? (\w+)\. The code of (\w+) is (\d{4})", last)
        assert match, last
        place, name, owner, _ = match.groups()
        assert owner == name
        assert name not in tokenizer.decode(question.prompt_token_ids[-12:]).rpartition("\n")[2]
        there = prompt.index(f"{name} is in the {place}.\n")
        assert there < prompt.index(f"The code of {name} is ")


def test_a_passage_goes_on(tokenizer: Any, filler: list[list[int]]) -> None:
    for question in questions("copy", tokenizer, filler, SIZE, 5, 5):
        cue = question.prompt_token_ids[-CUE:]
        passage = cue + question.answer_token_ids
        assert len(question.answer_token_ids) == COPIED
        page = question.prompt_token_ids[:-CUE]
        found = [i for i in range(len(page)) if page[i : i + CUE] == cue]
        assert len(found) == 1  # else there would be two answers
        assert page[found[0] : found[0] + len(passage)] == passage
        assert tokenizer.decode(page).endswith("\nAs was said before:\n")


def test_needles_share_a_page(tokenizer: Any, filler: list[list[int]]) -> None:
    asked = questions("needles", tokenizer, filler, SIZE, 4, 6)
    codes = [re.findall(r"The code of (\w+ is \d{4})\.", parts(tokenizer, q)[0]) for q in asked]
    assert len(codes[0]) == len(set(codes[0])) == 4
    assert all(of == codes[0] for of in codes)
    asked_for = [parts(tokenizer, q)[1].removeprefix("The code of ") for q in asked]
    assert asked_for == codes[0]  # in order of depth
    assert {question.num_stated for question in asked} == {4}


def test_fewer_pairs_where_there_is_less_room(tokenizer: Any, filler: list[list[int]]) -> None:
    pairs = {n: questions("kv", tokenizer, filler, n, 3, 0)[0].num_stated for n in (100, 160, 600)}
    assert pairs[600] == 8
    assert 2 <= pairs[100] < pairs[160] < 8


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides(task: str, tokenizer: Any, filler: list[list[int]]) -> None:
    first, again, other = (questions(task, tokenizer, filler, SIZE, 4, s) for s in (0, 0, 1))
    assert first == again
    assert all(a.prompt_token_ids != b.prompt_token_ids for a, b in zip(first, other, strict=True))


def test_a_tokenizer_that_joins_spaces_and_digits(tokenizer: Any, filler: list[list[int]]) -> None:
    """As that of GPT-NeoX does, which puts no BOS before a prompt either."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pages = [tokenizer.decode(ids[1:]) for ids in filler]
    numbers = [f"The number is {number}." for number in range(1000, 10_000)]
    bpe.train_from_iterator(
        [*pages, *numbers], trainers.BpeTrainer(vocab_size=4000, show_progress=False)
    )
    other = PreTrainedTokenizerFast(tokenizer_object=bpe)
    documents = [other(page)["input_ids"] for page in pages]
    for task, pattern in SAID_TWICE.items():
        for question in questions(task, other, documents, 400, 5, 0):
            whole = question.prompt_token_ids + question.answer_token_ids
            assert len(whole) == 400
            line = other.decode(whole).rpartition("\n")[2]
            assert re.search(pattern, line)
            # The model's own tokens for the line: the space is the answer's.
            assert other(f"\n{line}")["input_ids"] == whole[-len(other(f"\n{line}")["input_ids"]) :]
            assert other.decode(question.answer_token_ids).startswith(" ")


def test_short_documents_are_joined(tokenizer: Any, filler: list[list[int]]) -> None:
    short = [[tokenizer.bos_token_id, *ids[1:101]] for ids in filler[:6]]
    (question,) = questions("passkey", tokenizer, short, SIZE, 1, 0)
    assert question.prompt_token_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("task", TASKS)
def test_what_does_not_fit_is_refused(task: str, tokenizer: Any, filler: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=rf"num_tokens 40 is too small for {task}") as error:
        questions(task, tokenizer, filler, 40, 5, 0)
    allowed = re.search(r"allowed: (\d+) and more", str(error.value))
    assert allowed
    smallest = int(allowed[1])
    assert len(questions(task, tokenizer, filler, smallest, 5, 0)) == 5
    with pytest.raises(ValueError, match=f"num_tokens {smallest - 1} is too small"):
        questions(task, tokenizer, filler, smallest - 1, 5, 0)


def test_bad_arguments_are_refused(tokenizer: Any, filler: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="task 'recall'; allowed: passkey, kv, needles, two_hop"):
        questions("recall", tokenizer, filler, SIZE, 5, 0)
    with pytest.raises(ValueError, match="count 0; allowed: 1 and more"):
        questions("passkey", tokenizer, filler, SIZE, 0, 0)
    with pytest.raises(ValueError, match=r"filler of 599 tokens.*allowed: 2000 and more"):
        questions("passkey", tokenizer, filler[:1], 2001, 5, 0)
    with pytest.raises(ValueError, match="repeats itself"):
        questions("copy", tokenizer, [[7] * 600], SIZE, 1, 0)


@pytest.mark.parametrize(
    ("draw", "said", "asked"),
    [
        (
            synthetic.passkey,
            r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.",
            r"What is the pass key\? The pass key is \d{5}\.",
        ),
        (
            synthetic.needles,
            r"The code of [A-Z]\w+ is \d{4}\.",
            r"The code of [A-Z]\w+ is \d{4}\.",
        ),
        (synthetic.pairs, r"(?m)^[a-z]+\d\d: \d{5}$", r"[a-z]+\d\d: \d{5}"),
    ],
)
def test_the_wording_is_one_of_training(
    draw: Callable[[np.random.Generator], synthetic.Puzzle], said: str, asked: str
) -> None:
    rng = np.random.default_rng(0)
    puzzles = [draw(rng) for _ in range(2000)]
    assert any(
        re.search(said, puzzle.statements[0])
        and any(re.fullmatch(asked, question) for question in puzzle.questions)
        for puzzle in puzzles
    )


def test_a_right_answer_is_the_whole_answer() -> None:
    asked = [Question("kv", depth, [9], [1, 2], 0.1, 1, 8) for depth in (0.0, 0.05, 0.5, 1.0)]
    score = accuracy(asked, [[1, 2], [1, 3], [1, 2, 7], [2, 1]])
    assert (score["accuracy"], score["count"]) == (0.5, 4)
    assert 0 < score["ci_low"] < 0.5 < score["ci_high"] < 1
    tenths = [(row["from"], row["accuracy"], row["count"]) for row in score["by_depth"]]
    assert tenths == [(0.0, 0.5, 2), (0.5, 1.0, 1), (0.9, 0.0, 1)]
    with pytest.raises(ValueError, match="shorter"):
        accuracy(asked, [[1, 2]])
    with pytest.raises(ValueError, match="trials"):
        accuracy([], [])


def test_recall_by_task(tokenizer: Any, filler: list[list[int]]) -> None:
    asked = [q for task in TASKS for q in questions(task, tokenizer, filler, SIZE, 4, 0)]
    told = {tuple(q.prompt_token_ids): q.answer_token_ids for q in asked if q.task != "kv"}
    measured = measure_recall(Copies(told), asked)
    assert {task: row["accuracy"] for task, row in measured.items()} == {
        task: float(task != "kv") for task in TASKS
    }
    assert measured["passkey"]["chance"] == pytest.approx(1 / 90_000)
    assert measured["kv"]["num_stated"] == 8
    assert all(row["count"] == 4 for row in measured.values())
