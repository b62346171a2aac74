"""The rows of a quality report: every combination once, and what tells it from the others."""

from __future__ import annotations

from benchmarks.rows import rows_of


def test_rows_by_budget_and_groups_of_layers() -> None:
    budgets = (264, 520)
    rows = rows_of(("full", "streaming", "semantic"), ("none",), budgets, (1, 5))
    assert [row.title(budgets) for row in rows] == [
        "full",
        "streaming @ 264",
        "streaming @ 520",
        "semantic @ 264",
        "semantic in 5 groups @ 264",
        "semantic @ 520",
        "semantic in 5 groups @ 520",
    ]
    assert [row.options.get("layer_groups") for row in rows] == [None] * 4 + [5, None, 5]


def test_one_number_of_groups_is_that_of_every_row_that_chooses() -> None:
    rows = rows_of(("streaming", "tova"), ("bitsandbytes",), (264,), (3,))
    assert [row.title((264,)) for row in rows] == ["NF4 + streaming", "NF4 + tova in 3 groups"]
