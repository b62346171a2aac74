"""The main job in one table: four ways to hold the same texts in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import statistics, texts
from .context import MODEL, RESULTS, context
from .engines import engine

NF4 = {"quantization": "bitsandbytes"}


@dataclass(frozen=True)
class Row:
    """One way to hold a text in memory."""

    title: str
    policy: str
    engine_kwargs: dict[str, Any]


ROWS = (
    Row("full", "full", {}),
    Row("streaming", "streaming", {}),
    Row("semantic", "semantic", {}),
    Row("NF4 + semantic", "semantic", NF4),
)


@dataclass(frozen=True)
class Settings:
    """How much text, and how."""

    model: str = str(MODEL)
    num_tokens: int = 2000
    num_prompt: int = 500
    num_documents: int = 4


def progress_bar(console: Console) -> Progress:
    """A bar that says what is under way, how far and since when."""
    return Progress(
        TextColumn("[progress.description]{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def run(settings: Settings, out: Path | None = RESULTS / "demo.json") -> dict[str, Any]:
    """Start an engine for each row, measure it, print the table, keep the JSON."""
    corpora = {
        name: texts.documents(name, settings.model, settings.num_tokens)[: settings.num_documents]
        for name in ("wikitext", "pg19")
    }
    console = Console()
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(ROWS) * 2)
        for row in ROWS:
            progress.update(task, description=f"{row.title}: starting vLLM")
            with engine(
                settings.model,
                row.policy,
                dtype="bfloat16",
                max_model_len=settings.num_tokens,
                max_num_batched_tokens=512,
                kv_cache_memory_bytes=256 << 20,
                enforce_eager=True,
                **({"block_size": 32} if row.policy == "full" else {}),
                **row.engine_kwargs,
            ) as side:
                progress.update(task, advance=1, description=f"{row.title}: reading")
                measured = side.nll(
                    [document for documents in corpora.values() for document in documents],
                    settings.num_prompt,
                )
                losses = iter(measured["nll"])
                perplexity = {
                    name: statistics.perplexity([next(losses) for _ in documents])
                    for name, documents in corpora.items()
                }
                num_tokens = settings.num_tokens * sum(map(len, corpora.values()))
                rows.append(
                    {
                        "row": row.title,
                        "perplexity": perplexity,
                        "tokens_per_second": num_tokens / measured["seconds"],
                    }
                    | side.stats()
                )
                progress.advance(task)
    report = {"context": context(**vars(settings)), "rows": rows}
    console.print(_table(report))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _table(report: dict[str, Any]) -> Table:
    settings = report["context"]
    table = Table(
        title=f"{settings['model']}, {settings['num_documents']} documents a text of "
        f"{settings['num_tokens']} tokens, teacher-forced after {settings['num_prompt']}"
    )
    table.add_column("KV policy")
    corpora = list(report["rows"][0]["perplexity"])
    for name in (*(f"PPL {name}" for name in corpora), "tok/s", "peak KV blocks"):
        table.add_column(name, justify="right")
    for name in ("evicted blocks", "weights MB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["row"],
            *(f"{row['perplexity'][name]:.2f}" for name in corpora),
            f"{row['tokens_per_second']:.0f}",
            str(row["peak_kv_blocks"]),
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
        )
    return table
