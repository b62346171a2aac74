"""Plots: files that are PNGs, and what their panels show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.context import RESULTS
from benchmarks.plots import loss_by_distance, ppl_against_budget, retention_map

STREAMING = {
    "policy": "streaming",
    "block_size": 32,
    "points": [100, 132, 200],
    "kept": [[0, 2, 3], [0, 3, 4], [0, 5, 6]],
}


def check_png(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


@pytest.fixture(scope="module")
def quality() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / "quality.json").read_text())
    return report


def test_perplexity_against_budget(tmp_path: Path) -> None:
    report = {
        "budgets": [136, 264, 520],
        "rows": {
            "streaming": {"books": [80.0, 78.0, 76.0], "news": [60.0, 58.0, 56.0]},
            "NF4 + streaming": {"books": [82.0, 80.0, 78.0], "news": [62.0, 60.0, 58.0]},
        },
        "full": {"books": 75.0, "news": 55.0},
    }
    figure = ppl_against_budget(report, tmp_path / "new" / "ppl.png")
    check_png(tmp_path / "new" / "ppl.png")
    assert [axes.get_title() for axes in figure.axes] == ["books", "news"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [line.get_label() for line in axes.lines] == [*report["rows"], "full cache"]
        assert axes.lines[0].get_color() == axes.lines[1].get_color()  # one policy


def test_loss_by_distance(quality: dict[str, Any], tmp_path: Path) -> None:
    figure = loss_by_distance(quality, tmp_path / "loss.png")
    check_png(tmp_path / "loss.png")
    assert [axes.get_title() for axes in figure.axes] == list(quality["documents"])
    axes = figure.axes[0]
    line = next(line for line in axes.lines if line.get_label() == "streaming")
    rows = {name: row["loss_by_distance"]["wikitext"] for name, row in quality["rows"].items()}
    expected = [b[1] - a[1] for a, b in zip(rows["full"], rows["streaming"], strict=True)]
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_without_full_there_is_no_difference(quality: dict[str, Any], tmp_path: Path) -> None:
    rows = {name: row for name, row in quality["rows"].items() if name != "full"}
    with pytest.raises(ValueError, match="a row full"):
        loss_by_distance(quality | {"rows": rows}, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_retention_map(tmp_path: Path) -> None:
    figure = retention_map(STREAMING, tmp_path / "one.png")
    check_png(tmp_path / "one.png")
    (axes,) = figure.axes
    states = axes.collections[0].get_array()
    assert np.asarray(states).reshape(7, 3).T.tolist() == [
        [2, 1, 2, 2, 0, 0, 0],
        [2, 1, 1, 2, 2, 0, 0],
        [2, 1, 1, 1, 1, 2, 2],
    ]


def test_several_policies_are_panels(tmp_path: Path) -> None:
    figure = retention_map([STREAMING, STREAMING | {"policy": "other"}], tmp_path / "two.png")
    check_png(tmp_path / "two.png")
    assert [axes.get_title() for axes in figure.axes] == ["streaming", "other"]


def test_a_point_without_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 points with 1 lists of blocks; allowed: one each"):
        retention_map(STREAMING | {"kept": [[0]]}, tmp_path / "map.png")
