"""The quality report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def of(report: dict[str, Any]) -> Iterator[Table]:
    """Every table that a report has the numbers for."""
    if report["documents"]:
        yield _perplexities(report)
        if report["differences"]:
            yield _differences(report)
    if any("recall" in row for row in report["rows"].values()):
        yield _recall(report)


def _columns(table: Table, names: list[str]) -> None:
    for name in names:
        table.add_column(name, justify="right")


def _perplexities(report: dict[str, Any]) -> Table:
    settings = report["context"]
    budgets = ", ".join(map(str, settings["budget"]))
    table = Table(
        title=f"{settings['model']}: {settings['num_tokens']} tokens a document, "
        f"scored after {settings['num_prompt']} by {settings['mode']}, budget {budgets}"
    )
    texts = list(report["documents"])
    table.add_column("KV policy")
    _columns(table, [f"PPL {text}" for text in texts])
    _columns(table, ["seconds", "attention ms", "tok/s", "evicted blocks", "weights MB"])
    _columns(table, ["peak KV MB"])
    for title, row in report["rows"].items():
        table.add_row(
            title,
            *(f"{row['perplexity'][text]:.2f}" for text in texts),
            f"{row['seconds']:.1f}",
            f"{row['attention_ms']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['peak_kv_bytes'] / 1e6:.1f}",
        )
    return table


def _differences(report: dict[str, Any]) -> Table:
    table = Table(title="nats per token, below zero: the first loses less; 95 % over documents")
    texts = list(report["documents"])
    table.add_column("first - second")
    _columns(table, texts)
    for pair, by_text in report["differences"].items():
        cells = [by_text[text] for text in texts]
        table.add_row(
            pair, *(f"{c['mean']:+.4f} [{c['ci_low']:+.4f}, {c['ci_high']:+.4f}]" for c in cells)
        )
    return table


def _recall(report: dict[str, Any]) -> Table:
    settings = report["context"]
    table = Table(
        title=f"recall from prompts of {settings['num_tokens']} tokens, "
        f"{settings['questions']} questions a task; 95 % Wilson"
    )
    rows = {title: row["recall"] for title, row in report["rows"].items() if "recall" in row}
    tasks = list(next(iter(rows.values())))
    table.add_column("KV policy")
    _columns(table, tasks)
    for title, row in rows.items():
        cells = [row[task] for task in tasks]
        table.add_row(
            title,
            *(f"{c['accuracy']:.0%} [{c['ci_low']:.0%}, {c['ci_high']:.0%}]" for c in cells),
        )
    return table
