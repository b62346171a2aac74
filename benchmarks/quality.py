"""What a cache loses: perplexity and recall under each policy, with intervals.

Through real engines, many documents in one batch. ``decode`` forces a text token by token, so
that a policy acts as it does in generation; ``prefill`` reads it in chunks, as prompts are.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_semantic.policies import POLICIES
from vllm_semantic.policies.oracle import FUTURE_ATTENTION

from . import plots, recall, tables, texts
from .context import RESULTS, context
from .demo import progress_bar
from .engines import RemoteEngine, engine
from .shapes import kv_bytes
from .statistics import by_distance, paired_difference, perplexity

BUCKET = 250
"""Tokens of a bucket of loss by distance."""

CHUNK = 512
"""Tokens of a prompt that are read at once in ``prefill`` mode."""

SINKS = 8
"""Tokens of a budget that are for sinks: a block in any case, also where a policy has four."""

CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 32, 16
"""What a policy sets where no block size is given."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str
    policies: tuple[str, ...] = ("full", "streaming", "semantic")
    quantization: tuple[str, ...] = ("none", "bitsandbytes")
    tasks: tuple[str, ...] = ("wikitext", "pg19")
    """Texts (see :func:`texts.read`) and recall tasks (:data:`recall.TASKS`)."""
    mode: str = "decode"
    budget: tuple[int, ...] = (264,)
    """Tokens; every row is measured at each, ``full`` once."""
    num_tokens: int = 2000
    num_prompt: int = 500
    max_documents: int = 24
    questions: int = 40
    """Of each recall task."""
    block_size: int | None = None
    dtype: str = "bfloat16"
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    # The study on Pythia-2.8B: 1000 tokens, 500 of them generated, 264 in the cache.
    "study": {"num_tokens": 1000, "num_prompt": 500, "budget": (264,)},
}


@dataclass(frozen=True)
class Row:
    """One way to hold a text in memory."""

    policy: str
    quantization: str
    budget: int
    options: dict[str, Any] = field(default_factory=dict)

    def title(self, budgets: tuple[int, ...]) -> str:
        """How the row is called in tables: only what tells it from the others."""
        of = "NF4 + " if self.quantization == "bitsandbytes" else ""
        if self.quantization not in ("none", "bitsandbytes"):
            of = f"{self.quantization} + "
        at = f" @ {self.budget}" if len(budgets) > 1 and self.policy != "full" else ""
        return f"{of}{self.policy}{at}"


def policy_options(policy: str, budget: int) -> dict[str, Any]:
    """A policy's options for a budget in tokens, such that all hold the same number of blocks.

    Raises:
        ValueError: the policy is not known, or the budget leaves it no room.
    """
    name, _, variant = policy.partition(":")
    if name not in POLICIES:
        raise ValueError(f"--policies {policy!r} is not known; allowed: {', '.join(POLICIES)}")
    cls = POLICIES[name]
    chosen: dict[str, Any] = {"similarity": variant} if variant else {}
    if not cls.bounded:
        return chosen
    parts = cls().parts()
    sink, recent = parts.pop("sink_tokens"), parts.pop("recent_tokens")
    room = budget - SINKS
    for option in parts:  # at most one
        # Halves stay halves; a recent window that is the smaller part stays while it is.
        recent = room // 2 if recent == parts[option] else min(recent, room // 2)
        chosen[option] = room - recent
    if not parts:
        recent = room
    if recent <= 0 or room <= 0:
        raise ValueError(
            f"--budget {budget} is too small for {policy}; allowed: {SINKS + 2} and more"
        )
    return {"sink_tokens": sink, "recent_tokens": recent, **chosen}


def rows_of(settings: Settings) -> list[Row]:
    """Every combination once."""
    rows = []
    for quantization, policy, budget in itertools.product(
        settings.quantization, settings.policies, settings.budget
    ):
        if policy == "full" and budget != settings.budget[0]:
            continue
        rows.append(Row(policy, quantization, budget, policy_options(policy, budget)))
    return rows


@dataclass
class Work:
    """What every engine is given: documents by text, and questions."""

    documents: dict[str, list[list[int]]]
    questions: list[recall.Question]
    foresight: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """For the oracle: the attention to come, of ``documents`` and of ``questions``."""


def prepare(settings: Settings) -> Work:
    """Read texts, make questions.

    Raises:
        ValueError: a task is neither a text nor a recall task, or does not fit.
    """
    from transformers import AutoTokenizer

    names = [name for name in settings.tasks if name not in recall.TASKS]
    found = {
        (name if name in texts.bundled() else Path(name).stem): texts.documents(
            name, settings.model, settings.num_tokens
        )[: settings.max_documents]
        for name in names
    }
    asked: list[recall.Question] = []
    tasks = [name for name in settings.tasks if name in recall.TASKS]
    if tasks:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
        filler = next(iter(found.values()), None) or texts.documents(
            "pg19", settings.model, settings.num_tokens
        )
        for task in tasks:
            asked += recall.questions(
                task, tokenizer, filler, settings.num_tokens, settings.questions, settings.seed
            )
    work = Work(found, asked)
    if "oracle" in settings.policies:
        _foresee(settings, work)
    return work


def _foresee(settings: Settings, work: Work) -> None:
    from .foresight import Foresight

    block_size = settings.block_size or (
        GPU_BLOCK_SIZE if torch.cuda.is_available() else CPU_BLOCK_SIZE
    )
    foresight = Foresight(settings.model, block_size)
    documents = [(d, settings.num_prompt) for of in work.documents.values() for d in of]
    answered = [
        (q.prompt_token_ids + q.answer_token_ids, len(q.prompt_token_ids)) for q in work.questions
    ]
    for name, of in (("documents", documents), ("questions", answered)):
        work.foresight[name] = [{FUTURE_ATTENTION: foresight(*item)} for item in of]


def run(settings: Settings, out: Path = RESULTS / "quality.json") -> dict[str, Any]:
    """Measure every combination; print the tables, keep the JSON, draw the plots beside it."""
    console = Console()
    rows = rows_of(settings)
    work = prepare(settings)
    measured: dict[str, dict[str, Any]] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            title = row.title(settings.budget)
            progress.update(task, description=title)
            measured[title] = measure(settings, row, work)
            progress.advance(task)
    report = summarise(settings, measured, work.documents)
    for table in tables.of(report):
        console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    for path in draw(report, out):
        console.print(f"plot: {path.name}")
    return report


def measure(settings: Settings, row: Row, work: Work) -> dict[str, Any]:
    """Everything about one row, on an engine of its own."""
    kwargs: dict[str, Any] = {"block_size": settings.block_size} if settings.block_size else {}
    if row.quantization != "none":
        kwargs["quantization"] = row.quantization
    documents = [document for of in work.documents.values() for document in of]
    if not torch.cuda.is_available():  # vLLM would take most of the machine's memory
        num_tokens = max(len(documents), 8) * (settings.num_tokens + 2 * 128)
        kwargs["kv_cache_memory_bytes"] = kv_bytes(settings.model, num_tokens, itemsize=4)
        kwargs["enforce_eager"] = True  # compiling takes longer than reading
    chunk = CHUNK if settings.mode == "prefill" else max(CHUNK, settings.num_tokens)
    name = row.policy.partition(":")[0]
    with engine(
        settings.model,
        name,
        row.options,
        dtype=settings.dtype,
        max_model_len=settings.num_tokens + 1,
        max_num_batched_tokens=chunk,
        **kwargs,
    ) as side:
        found: dict[str, Any] = {"options": row.options, "settings": side.settings()}
        if documents:
            found |= _read(settings, side, name, documents, work)
        if work.questions:
            future = work.foresight.get("questions") if name == "oracle" else None
            found["recall"] = recall.measure_recall(side, work.questions, future)
        return found | side.stats() | {"memory": side.memory()}


def _read(
    settings: Settings, side: RemoteEngine, policy: str, documents: list[list[int]], work: Work
) -> dict[str, Any]:
    """Losses of all documents, the attention of a late step, and which blocks lived."""
    if settings.mode == "prefill":
        found: dict[str, Any] = side.nll_of_prompts(documents, settings.num_prompt)
    else:
        future = work.foresight.get("documents") if policy == "oracle" else None
        found = side.nll(documents, settings.num_prompt, future)
    found["peak_kv_blocks"] = side.stats()["peak_kv_blocks"]
    late = documents[0][: settings.num_tokens - 100]
    found["attention_ms"] = side.attention([late])["seconds"] * 1e3
    if POLICIES[policy].bounded and settings.mode == "decode" and policy != "oracle":
        found["retention"] = side.retention(documents[0], settings.num_prompt)
    return found


def summarise(
    settings: Settings, rows: dict[str, dict[str, Any]], found: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """The report: per row and text a perplexity, per pair of rows a difference."""
    report: dict[str, Any] = {
        "context": context(**asdict(settings)),
        "documents": {name: len(of) for name, of in found.items()},
        "rows": {},
        "differences": {},
    }
    losses: dict[str, dict[str, list[list[float]]]] = {}
    for name, row in rows.items():
        every = iter(row.pop("nll", []))
        losses[name] = {text: [next(every) for _ in of] for text, of in found.items()}
        report["rows"][name] = row | _of_losses(settings, losses[name], row)
    for first, second in itertools.combinations(rows, 2):
        report["differences"][f"{first} - {second}"] = {
            text: asdict(paired_difference(losses[first][text], losses[second][text]))
            | {"by_distance": _differences(settings, losses[first][text], losses[second][text])}
            for text in found
        }
    return report


def _of_losses(
    settings: Settings, losses: dict[str, list[list[float]]], row: dict[str, Any]
) -> dict[str, Any]:
    if not losses:
        return {}
    scored = sum(len(document) for of in losses.values() for document in of)
    peak = row["peak_kv_blocks"] * row["memory"]["kv_pool"] / (row["num_blocks"] + 1)
    return {
        "perplexity": {text: perplexity(of) for text, of in losses.items()},
        "loss_by_distance": {
            text: by_distance(of, settings.num_prompt, BUCKET) for text, of in losses.items()
        },
        "tokens_per_second": scored / row["seconds"],
        "peak_kv_bytes": peak,
    }


def _differences(
    settings: Settings, first: list[list[float]], second: list[list[float]]
) -> list[dict[str, float]]:
    """The paired difference in buckets by distance from the documents' start."""
    start, end = settings.num_prompt, settings.num_prompt + len(first[0])
    buckets = []
    for left in range(start // BUCKET * BUCKET, end, BUCKET):
        part = slice(max(0, left - start), left + BUCKET - start)
        pair = ([document[part] for document in of] for of in (first, second))
        buckets.append({"from": left, **asdict(paired_difference(*pair))})
    return buckets


def draw(report: dict[str, Any], out: Path) -> Iterable[Path]:
    """The plots that a report has the numbers for, as PNG beside ``out``."""
    rows, settings = report["rows"], report["context"]
    maps = [row["retention"] for row in rows.values() if "retention" in row]
    if maps:
        plots.retention_map(maps[:4], path := out.with_name(f"{out.stem}-retention.png"))
        yield path
    if not report["documents"] or "full" not in rows:
        return
    if len(settings["budget"]) > 1:
        path = out.with_name(f"{out.stem}-budget.png")
        plots.ppl_against_budget(_by_budget(report), path)
    else:
        path = out.with_name(f"{out.stem}-distance.png")
        plots.loss_by_distance(report, path)
    yield path


def _by_budget(report: dict[str, Any]) -> dict[str, Any]:
    rows, budgets = report["rows"], report["context"]["budget"]
    policies = dict.fromkeys(name.partition(" @ ")[0] for name in rows if " @ " in name)
    return {
        "budgets": list(budgets),
        "full": rows["full"]["perplexity"],
        "rows": {
            policy: {
                text: [rows[f"{policy} @ {b}"]["perplexity"][text] for b in budgets]
                for text in report["documents"]
            }
            for policy in policies
        },
    }


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that the issue of quality is judged by, as far as the report has their rows."""
    rows, found = report["rows"], {}
    ppl = {name: row["perplexity"] for name, row in rows.items() if "perplexity" in row}
    for text in report["documents"]:
        if {"full", "streaming", "semantic"} <= ppl.keys():
            excess = {name: ppl[name][text] / ppl["full"][text] - 1 for name in ppl}
            found[f"ppl_excess_ratio_{text}"] = excess["semantic"] / excess["streaming"]
            found[f"ppl_full_gain_over_streaming_{text}"] = excess["streaming"]
        pair = report["differences"].get("streaming - NF4 + semantic", {}).get(text)
        if pair:
            name = f"nll_nf4_semantic_minus_streaming_{text}"
            found[name] = -pair["mean"]
            found[f"{name}_ci_low"], found[f"{name}_ci_high"] = -pair["ci_high"], -pair["ci_low"]
    rules = [name for name in ppl if name not in ("full", "oracle") and "NF4" not in name]
    if len(rules) > 2:
        found["best_rule"] = min(rules, key=lambda name: sum(map(math.log, ppl[name].values())))
    if "ppl_full_gain_over_streaming_pg19" in found:
        found["ppl_full_gain_over_streaming"] = found["ppl_full_gain_over_streaming_pg19"]
    for policy in ("semantic", "streaming"):
        for task in ("passkey", "kv"):
            measured = rows.get(policy, {}).get("recall", {}).get(task)
            if measured:
                found[f"recall_{task}_{policy}"] = measured["accuracy"]
    return found
