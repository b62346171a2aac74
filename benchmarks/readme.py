"""Writes the README's tables from the committed results."""

from __future__ import annotations

import json
import re
from typing import Any

from .context import RESULTS, ROOT

FIGURES = {
    "no_eviction_throughput_ratio": "budget never reached: throughput over stock",
    "kv_bound_throughput_ratio": "64 requests on a KV pool for 8 full ones: throughput over stock",
    "kv_bound_ideal_ratio": "the same, stock with a pool for all 64 (no eviction, 8 x the memory)",
    "decode_flatness_4k_over_512": "decode step at 4k of context over one at 512",
    "decode_flatness_4k_over_512_stock": "the same, stock",
    "scoring_share_of_step": "scoring and eviction, share of a decode step",
    "compaction_share_of_step": "table compaction, share of a decode step",
}

PAIRS = ("full - streaming", "streaming - semantic", "streaming - NF4 + semantic")
"""Differences that the README shows; the JSON has all."""


def run() -> None:
    """Replace what stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, render in (("demo", _demo), ("figures", _figures), ("quality", _quality)):
        report = json.loads((RESULTS / f"{name}.json").read_text())
        parts = re.split(rf"(<!-- /?table:{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"README.md does not have one place for the table {name!r}")
        parts[2] = f"\n\n{render(report)}\n\n"
        text = "".join(parts)
    readme.write_text(text)


def _demo(report: dict[str, Any]) -> str:
    corpora = list(report["rows"][0]["perplexity"])
    head = ["KV policy", *(f"PPL {name}" for name in corpora)]
    head += ["tok/s", "peak KV blocks", "evicted blocks", "weights MB"]
    rows = [
        [
            row["row"],
            *(f"{row['perplexity'][name]:.2f}" for name in corpora),
            f"{row['tokens_per_second']:.0f}",
            str(row["peak_kv_blocks"]),
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
        ]
        for row in report["rows"]
    ]
    settings = report["context"]
    return _table(head, rows) + (
        f"\n\n{settings['num_documents']} documents a text of {settings['num_tokens']} tokens, "
        f"teacher-forced token by token after {settings['num_prompt']}; {_where(settings)}."
    )


def _figures(report: dict[str, Any]) -> str:
    rows = [[words, f"{report[name]:.3f}"] for name, words in FIGURES.items()]
    return _table(["figure", "measured"], rows) + f"\n\n{_where(report['context'])}."


def _quality(report: dict[str, Any]) -> str:
    names = list(report["documents"])
    rows = [
        [title, *(f"{row['perplexity'][name]:.2f}" for name in names)]
        for title, row in report["rows"].items()
    ]
    differences = [
        [pair, *(f"{c['mean']:+.4f} [{c['ci_low']:+.4f}, {c['ci_high']:+.4f}]" for c in cells)]
        for pair in PAIRS
        for cells in [[report["differences"][pair][name] for name in names]]
    ]
    settings = report["context"]
    counts = ", ".join(f"{count} of {name}" for name, count in report["documents"].items())
    return "\n\n".join(
        (
            _table(["perplexity", *names], rows),
            _table(["nats per token", *names], differences),
            f"{settings['model']}, budget {settings['budget']}, documents of "
            f"{settings['num_tokens']} tokens ({counts}), scored after {settings['num_prompt']}; "
            f"below zero, the first loses less; {_where(settings)}.",
        )
    )


def _where(context: dict[str, Any]) -> str:
    machine, versions = context["machine"], context["versions"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, vLLM {versions['vllm']}, "
        f"torch {versions['torch']}, {context['date'][:10]}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
