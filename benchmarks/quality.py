"""What a cache loses: perplexity under each policy, with paired intervals.

Through real engines, many documents in one batch. ``decode`` forces a text token by token, so
that a policy acts as it does in generation; ``prefill`` reads it in chunks, as prompts are.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import texts
from .context import RESULTS, context
from .demo import progress_bar
from .engines import engine
from .shapes import kv_bytes
from .statistics import by_distance, paired_difference, perplexity

BUCKET = 250
"""Tokens of a bucket of loss by distance."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: str
    policies: tuple[str, ...] = ("full", "streaming", "semantic")
    quantization: tuple[str, ...] = ("none", "bitsandbytes")
    texts: tuple[str, ...] = ()
    """Files or folders of one's own, each a text of the table; default: the bundled ones."""
    mode: str = "decode"
    budget: int = 264
    num_tokens: int = 2000
    num_prompt: int = 500
    max_documents: int = 32
    block_size: int | None = None
    dtype: str = "bfloat16"


PRESETS: dict[str, dict[str, Any]] = {
    # The study on Pythia-2.8B: 1000 tokens, 500 of them generated, 264 in the cache.
    "study": {"num_tokens": 1000, "num_prompt": 500, "budget": 264},
}


def policy_options(policy: str, budget: int) -> dict[str, int]:
    """A policy's options for a budget in tokens, in the proportions of its defaults.

    Raises:
        ValueError: the budget leaves nothing beside the sinks and the recent window.
    """
    if policy == "streaming":
        options = {"sink_tokens": 4, "recent_tokens": budget - 8}
    elif policy == "semantic":
        options = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": budget - 72}
    else:
        return {}
    if min(options.values()) <= 0:
        raise ValueError(f"--budget {budget} is too small for {policy}; allowed: 73 and more")
    return options


def corpora(settings: Settings) -> dict[str, list[list[int]]]:
    """Documents by the name of their text."""
    paths = [Path(path) for path in settings.texts]
    if not paths:
        paths = [texts.TEXTS / name for name in texts.corpora()]
    return {
        path.stem: texts.documents(path, settings.model, settings.num_tokens)[
            : settings.max_documents
        ]
        for path in paths
    }


def run(settings: Settings, out: Path = RESULTS / "quality.json") -> dict[str, Any]:
    """Measure every combination, print the table, keep the JSON."""
    console = Console()
    found = corpora(settings)
    documents = [document for of in found.values() for document in of]
    rows: dict[str, dict[str, Any]] = {}
    combinations = list(itertools.product(settings.quantization, settings.policies))
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(combinations))
        for quantization, policy in combinations:
            name = policy if quantization == "none" else f"NF4 + {policy}"
            progress.update(task, description=name)
            rows[name] = measure(settings, policy, quantization, documents)
            progress.advance(task)
    report = summarise(settings, rows, found)
    console.print(_table(report))
    console.print(_differences(report))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def measure(
    settings: Settings, policy: str, quantization: str, documents: list[list[int]]
) -> dict[str, Any]:
    """Losses of all documents on an engine of their own, and what the engine did."""
    kwargs: dict[str, Any] = {"block_size": settings.block_size} if settings.block_size else {}
    if quantization != "none":
        kwargs["quantization"] = quantization
    if not torch.cuda.is_available():  # vLLM would take most of the machine's memory
        num_tokens = len(documents) * (settings.num_tokens + 2 * 128)
        kwargs["kv_cache_memory_bytes"] = kv_bytes(settings.model, num_tokens, itemsize=4)
        kwargs["enforce_eager"] = True  # compiling takes longer than reading
    with engine(
        settings.model,
        policy,
        policy_options(policy, settings.budget),
        dtype=settings.dtype,
        max_model_len=settings.num_tokens + 1,
        max_num_batched_tokens=512,
        **kwargs,
    ) as side:
        losses = side.nll if settings.mode == "decode" else side.nll_of_prompts
        return losses(documents, settings.num_prompt) | side.stats() | {"memory": side.memory()}


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
        every = iter(row.pop("nll"))
        losses[name] = {text: [next(every) for _ in of] for text, of in found.items()}
        scored = sum(len(document) for of in losses[name].values() for document in of)
        report["rows"][name] = row | {
            "perplexity": {text: perplexity(of) for text, of in losses[name].items()},
            "loss_by_distance": {
                text: by_distance(of, settings.num_prompt, BUCKET)
                for text, of in losses[name].items()
            },
            "tokens_per_second": scored / row["seconds"],
        }
    for first, second in itertools.combinations(rows, 2):
        report["differences"][f"{first} - {second}"] = {
            text: asdict(paired_difference(losses[first][text], losses[second][text]))
            for text in found
        }
    return report


def _table(report: dict[str, Any]) -> Table:
    settings = report["context"]
    table = Table(
        title=f"{settings['model']}: {settings['num_tokens']} tokens a document, "
        f"scored after {settings['num_prompt']} by {settings['mode']}, budget {settings['budget']}"
    )
    names = list(report["documents"])
    table.add_column("KV policy")
    for name in (*(f"PPL {name}" for name in names), "seconds", "tok/s"):
        table.add_column(name, justify="right")
    for name in ("evicted blocks", "weights MB", "KV pool MB"):
        table.add_column(name, justify="right")
    for title, row in report["rows"].items():
        table.add_row(
            title,
            *(f"{row['perplexity'][name]:.2f}" for name in names),
            f"{row['seconds']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['memory']['kv_pool'] / 1e6:.0f}",
        )
    return table


def _differences(report: dict[str, Any]) -> Table:
    table = Table(title="nats per token, below zero: the first loses less; 95 % over documents")
    names = list(report["documents"])
    table.add_column("first - second")
    for name in names:
        table.add_column(name, justify="right")
    for pair, of in report["differences"].items():
        cells = [of[name] for name in names]
        table.add_row(
            pair, *(f"{c['mean']:+.4f} [{c['ci_low']:+.4f}, {c['ci_high']:+.4f}]" for c in cells)
        )
    return table
