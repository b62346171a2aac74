"""Quality: perplexity and recall under each policy, with intervals.

Through real engines, many documents in one batch. ``decode`` forces a text token by token, so
that a policy acts as it does in generation; ``prefill`` reads it in chunks, as prompts are.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_semantic.policies import POLICIES
from vllm_semantic.policies.oracle import FUTURE_ATTENTION
from vllm_semantic.recall import RECALL_BLOCKS, RECALL_GIB
from vllm_semantic.upstream.hooks import DEFAULT_BLOCK_SIZE

from . import recall, tables, texts
from .context import RESULTS, context
from .engines import RemoteEngine, engine
from .models import CHECKPOINT
from .progress import progress_bar
from .rows import Row, recalls, rows_of, server_options
from .shapes import kv_bytes
from .statistics import by_distance, difference, excess_ratio, paired_difference, perplexity

BUCKET = 250
"""Tokens of a bucket of loss by distance."""

CHUNK = 512
"""Tokens of a prompt that are read at once in ``prefill`` mode."""


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
    layer_groups: tuple[int, ...] = (1,)
    """Of layers that evict for themselves; every rule that scores is measured with each."""
    layer_skew_tokens: int = 0
    """What the last of several groups keeps beyond the budget, and the first falls short of it."""
    recall_gib: int = 4
    recall_blocks: int = 2
    """Host memory, and blocks that come back at a point of an answer, where a policy recalls."""
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

    platform = "cuda" if torch.cuda.is_available() else "cpu"
    block_size = settings.block_size or DEFAULT_BLOCK_SIZE[platform]
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
    rows = rows_of(
        settings.policies,
        settings.quantization,
        settings.budget,
        settings.layer_groups,
        settings.layer_skew_tokens,
    )
    work = prepare(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, Any]] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(rows))
        for row in rows:
            title = row.title(settings.budget)
            progress.update(task, description=title)
            began = time.perf_counter()
            measured[title] = measure(settings, row, work)
            report = summarise(settings, measured, work.documents)
            out.write_text(json.dumps(report, indent=1) + "\n")  # a run may be cut short
            progress.advance(task)
            console.print(f"{title}: {time.perf_counter() - began:.0f} s")
    for table in tables.of(report):
        console.print(table)
    for path in draw(report, out):
        console.print(f"plot: {path.name}")
    return report


def measure(settings: Settings, row: Row, work: Work) -> dict[str, Any]:
    """Everything about one row, on an engine of its own."""
    kwargs: dict[str, Any] = {"block_size": settings.block_size} if settings.block_size else {}
    kwargs |= row.engine_kwargs
    documents = [document for of in work.documents.values() for document in of]
    if not torch.cuda.is_available():  # vLLM would take most of the machine's memory
        num_tokens = max(len(documents), 8) * (settings.num_tokens + 2 * 128)
        kwargs["kv_cache_memory_bytes"] = kv_bytes(settings.model, num_tokens, itemsize=4)
        kwargs["enforce_eager"] = True  # compiling takes longer than reading
    recall_options = server_options(
        [row], {RECALL_GIB: settings.recall_gib, RECALL_BLOCKS: settings.recall_blocks}
    )
    chunk = CHUNK if settings.mode == "prefill" else max(CHUNK, settings.num_tokens)
    name = row.policy.partition(":")[0]
    with engine(
        settings.model,
        name,
        row.options | recall_options,
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
        every = iter(row.get("nll", []))
        losses[name] = {text: [next(every) for _ in of] for text, of in found.items()}
        kept = {what: value for what, value in row.items() if what != "nll"}
        report["rows"][name] = kept | _of_losses(settings, losses[name], row)
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
    from . import plots  # other benchmarks run where there is no matplotlib

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
    """The figures of quality, as far as a report has their rows.

    On SmolLM2 they are called ``real_...``, and are of the one row of the semantic policy.
    """
    if report["context"]["model"] == CHECKPOINT:
        return _real_headline(report)
    rows, found = report["rows"], {}
    ppl = {name: row["perplexity"] for name, row in rows.items() if "perplexity" in row}
    for text in report["documents"]:
        if {"full", "streaming", "semantic"} <= ppl.keys():
            ours, full, age = (ppl[name][text] for name in ("semantic", "full", "streaming"))
            found[f"ppl_excess_ratio_{text}"] = excess_ratio(ours, full, age)
            found[f"ppl_full_gain_over_streaming_{text}"] = age / full - 1
        if {"streaming", "NF4 + semantic"} <= ppl.keys():
            name = f"nll_nf4_semantic_minus_streaming_{text}"
            less = difference(report["differences"], "NF4 + semantic", "streaming", text)
            found[name] = less["mean"]
            found |= {f"{name}_{end}": less[end] for end in ("ci_low", "ci_high")}
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


def _real_headline(report: dict[str, Any]) -> dict[str, float]:
    """Excess over the full cache by streaming's, and what is lost less streaming's, in nats; of the
    row that recalls, if there is one, the excess.

    Raises:
        ValueError: the report has not one row of the semantic policy beside one that recalls.
    """
    ours = [name for name in report["rows"] if name.startswith("semantic")]
    recalled = [name for name in ours if recalls(name)]
    semantic = [name for name in ours if name not in recalled]
    if len(semantic) != 1 or len(recalled) > 1:
        raise ValueError(f"--figures: of which row? {', '.join(ours)}; allowed: one")
    found = {}
    for text in report["documents"]:
        for name in recalled:
            ppl = (report["rows"][row]["perplexity"][text] for row in (name, "full", "streaming"))
            found[f"recalled_excess_{text}"] = excess_ratio(*ppl)
        less = difference(report["differences"], semantic[0], "streaming", text)
        if report["context"]["mode"] == "prefill":
            found[f"real_prefill_semantic_minus_streaming_{text}"] = less["mean"]
        else:
            rows = (*semantic, "full", "streaming")
            ppl = (report["rows"][row]["perplexity"][text] for row in rows)
            found[f"real_excess_{text}"] = excess_ratio(*ppl)
            found[f"real_semantic_minus_streaming_upper_{text}"] = less["ci_high"]
    return found
