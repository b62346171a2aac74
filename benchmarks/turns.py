"""Facts far back in a document, asked for with it and in a turn that comes later.

One engine serves all budgets of the semantic policy, beside the full cache and streaming, each
request under its own; any other policy has an engine of its own. There a document is read once:
with prefix caching on, every request about it finds the exact blocks of what comes before its first
eviction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_semantic.layer_groups import LAYER_GROUPS, LAYER_SKEW
from vllm_semantic.recall import RECALL_GIB
from vllm_semantic.served import MAX_REQUEST_TOKENS, REQUEST_KEY

from . import recall, texts
from .context import RESULTS, context
from .engines import RemoteEngine, engine
from .progress import progress_bar
from .rows import Row, recalls, rows_of, server_options
from .shapes import kv_bytes

AT_ONCE, LATER = "with the document", "in a later turn"

EVERYWHERE = ("full", "streaming", "semantic")
"""Policies of the rows that an engine with the semantic policy serves."""

TASKS: dict[str, recall.Lookup] = {
    name: replace(task, num_asked=4)
    for name, task in recall.TASKS.items()
    if name in ("kv", "needles") and isinstance(task, recall.Lookup)
}
"""Those that ask several questions about one document."""

FIGURE_BUDGET = 264

ROOM = 64
"""Tokens beyond a document, for a question that comes later and its answer."""


@dataclass(frozen=True)
class Settings:
    """What is asked, of what."""

    model: str
    policies: tuple[str, ...] = ("full", "streaming", "semantic")
    budget: tuple[int, ...] = (264,)
    num_tokens: tuple[int, ...] = (2000,)
    questions: int = 12
    """Of each task, four a document."""
    layer_groups: int = 1
    layer_skew_tokens: int = 0
    recall_gib: int = 4
    """Host memory, where a policy recalls."""
    dtype: str = "bfloat16"
    seed: int = 0


def run(settings: Settings, out: Path = RESULTS / "turns.json") -> dict[str, Any]:
    """Ask everything under every policy; print the table, keep the JSON."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    filler = texts.documents("pg19", settings.model, min(settings.num_tokens))
    rows = rows_of(settings.policies, ("none",), settings.budget)
    options = {
        LAYER_GROUPS: settings.layer_groups,
        LAYER_SKEW: settings.layer_skew_tokens,
        **server_options(rows, {RECALL_GIB: settings.recall_gib}),
    }
    report: dict[str, Any] = {"context": context(**asdict(settings)), "lengths": {}}
    console = Console()
    with progress_bar(console) as progress:
        servers = _by_server(rows)
        total = len(settings.num_tokens) * len(servers) * len(TASKS) * settings.questions
        bar = progress.add_task("", total=total)
        for num_tokens in settings.num_tokens:
            asked = [
                question
                for name, task in TASKS.items()
                for question in recall.ask_task(
                    name, task, tokenizer, filler, num_tokens, settings.questions, settings.seed
                )
            ]
            asked.sort(key=lambda question: question.prompt_token_ids)  # document by document
            answers: dict[str, dict[str, list[list[int]]]] = {}
            evicted = 0
            for server, of_server in servers.items():
                progress.update(bar, description=f"{num_tokens} tokens, {server}: starting vLLM")
                with reader(
                    settings.model, num_tokens, options, server, dtype=settings.dtype
                ) as side:
                    progress.update(bar, description=f"{num_tokens} tokens, {server}: asking")
                    for question in asked:
                        for when, prompt in _prompts(question, num_tokens, filler[0]):
                            for row, answer in ask(side, of_server, question, prompt):
                                title = row.title(settings.budget)
                                answers.setdefault(when, {}).setdefault(title, []).append(answer)
                        progress.advance(bar)
                    evicted += side.stats()["evicted_blocks"]
            found = {
                when: {title: _accuracies(asked, of) for title, of in by_row.items()}
                for when, by_row in answers.items()
            }
            report["lengths"][str(num_tokens)] = {"evicted_blocks": evicted, "asked": found}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")  # a run may be cut short
    console.print(_table(report))
    return report


def _by_server(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows that an engine with each of these policies serves."""
    servers: dict[str, list[Row]] = {}
    for row in rows:
        name = row.policy.partition(":")[0]
        servers.setdefault("semantic" if name in EVERYWHERE else name, []).append(row)
    return servers


def reader(
    model: str,
    num_tokens: int,
    options: Mapping[str, Any] | None = None,
    policy: str = "semantic",
    **kwargs: Any,
) -> AbstractContextManager[RemoteEngine]:
    """An engine that cuts a document of ``num_tokens`` down when it is read, and not before; its
    requests may ask for ``policy``, the full cache or streaming."""
    return engine(
        model,
        policy,
        {MAX_REQUEST_TOKENS: num_tokens + ROOM, **(options or {})},
        max_model_len=num_tokens + ROOM,
        max_num_batched_tokens=num_tokens,
        enable_prefix_caching=True,
        enforce_eager=True,
        kv_cache_memory_bytes=kv_bytes(model, 3 * num_tokens + 4096, itemsize=4),
        **kwargs,
    )


def _prompts(
    question: recall.Question, num_tokens: int, filler: list[int]
) -> Iterator[tuple[str, list[int]]]:
    """The document and the question as one prompt, and in a later turn."""
    yield AT_ONCE, question.prompt_token_ids
    yield LATER, later(question, num_tokens, filler)


def later(question: recall.Question, num_tokens: int, filler: list[int]) -> list[int]:
    """Document and question with as much filler between them that :func:`reader` has read the
    document, and cut it down, before the first token of the question."""
    cut = len(question.prompt_token_ids) - question.num_question_tokens
    document, asked = question.prompt_token_ids[:cut], question.prompt_token_ids[cut:]
    return document + filler[1 : 1 + num_tokens - cut] + asked


def ask(
    side: RemoteEngine, rows: list[Row], question: recall.Question, prompt: list[int]
) -> Iterator[tuple[Row, list[int]]]:
    """What each row answers; the first reads the document, the others find its blocks."""
    num_new = len(question.answer_token_ids)
    for part in filter(None, (rows[:1], rows[1:])):
        asked = [
            {REQUEST_KEY: {"name": row.policy.partition(":")[0], **row.options}} for row in part
        ]
        answers = side.tokens([prompt] * len(part), num_new, asked)
        yield from zip(part, answers, strict=True)


def _accuracies(
    asked: list[recall.Question], answers: list[list[int]]
) -> dict[str, dict[str, Any]]:
    """By task, over all depths."""
    pairs = list(zip(asked, answers, strict=True))
    found = {}
    for task in TASKS:
        of_task = [pair for pair in pairs if pair[0].task == task]
        found[task] = recall.accuracy(*zip(*of_task, strict=True))
        del found[task]["by_depth"]
    return found


def headline(report: dict[str, Any]) -> dict[str, float]:
    """The figures of a document of 4000 tokens and a budget of 264, over both kinds of facts.

    Raises:
        ValueError: the report has them not, or of several policies.
    """
    rows = report["lengths"].get("4000", {}).get("asked", {}).get(LATER, {})
    at = f" @ {FIGURE_BUDGET}" if len(report["context"]["budget"]) > 1 else ""
    ours = [name for name in rows if name.startswith("semantic") and name.endswith(at)]
    recalled = [name for name in ours if recalls(name)]
    evicted = [name for name in ours if name not in recalled]
    if len(recalled) != 1 or len(evicted) != 1 or "full" not in rows:
        raise ValueError(
            f"--figures: needs full and two rows of the semantic policy at {FIGURE_BUDGET}, one "
            f"that recalls; there are {', '.join(rows)}"
        )
    titles = {"full": "full", "evicted": evicted[0], "recalled": recalled[0]}
    return {
        f"later_turn_recall_{name}": sum(of["accuracy"] for of in rows[title].values()) / len(TASKS)
        for name, title in titles.items()
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['context']['model']}: right answers, {' / '.join(TASKS)}")
    table.add_column("KV policy")
    head, rows = columns(report)
    for name in head:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    return table


def columns(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A column for each length and turn, a row for each policy, right answers of each task in %."""
    head, cells = [], {}
    for num_tokens, of_length in report["lengths"].items():
        for when, by_row in of_length["asked"].items():
            head.append(f"{num_tokens}, {when}")
            for title, by_task in by_row.items():
                shares = (f"{100 * of['accuracy']:.0f}" for of in by_task.values())
                cells.setdefault(title, [title]).append(" / ".join(shares))
    return head, list(cells.values())
