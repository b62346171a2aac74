"""The figures of the real model, from a report of it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.models import CHECKPOINT
from benchmarks.quality import headline

LESS = {"mean": 0.03, "ci_low": 0.01, "ci_high": 0.05}
"""What streaming loses beyond semantic, in nats."""


def report(mode: str, *rows: str) -> dict[str, Any]:
    ppl = {"full": 10.0, "streaming": 12.0}
    return {
        "context": {"model": CHECKPOINT, "mode": mode},
        "documents": {"wikitext": 3},
        "rows": {row: {"perplexity": {"wikitext": ppl.get(row, 11.5)}} for row in rows},
        "differences": {f"streaming - {row}": {"wikitext": LESS} for row in rows},
    }


def test_decoded() -> None:
    found = headline(report("decode", "full", "streaming", "semantic:contribution in 5 groups"))
    assert found == {
        "real_excess_wikitext": pytest.approx(0.75),
        "real_semantic_minus_streaming_upper_wikitext": -0.01,
    }


def test_with_recall() -> None:
    rows = "full", "streaming", "semantic in 3 groups", "semantic:recall in 3 groups"
    found = headline(report("decode", *rows))
    assert found.keys() == {
        "real_excess_wikitext",
        "real_semantic_minus_streaming_upper_wikitext",
        "recalled_excess_wikitext",
    }
    assert found["recalled_excess_wikitext"] == pytest.approx(0.75)


def test_read_by_prefill() -> None:
    found = headline(report("prefill", "full", "streaming", "semantic"))
    assert found == {"real_prefill_semantic_minus_streaming_wikitext": -0.03}


def test_of_one_row() -> None:
    with pytest.raises(ValueError, match="--figures: of which row"):
        headline(report("decode", "full", "streaming", "semantic", "semantic:study"))
