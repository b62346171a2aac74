"""Plots of reports: what a budget costs, where the loss is, which blocks live."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito (2008): told apart with any colour vision; the yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#555555"
ABSENT, EVICTED, KEPT = "#FFFFFF", "#D9D9D9", "#0072B2"
MARKERS = ("o", "s", "^", "D", "v", "P")
NF4 = "NF4 + "
DPI = 150
PANEL_WIDTH, PANEL_HEIGHT = 4.4, 3.4
"""Inches."""


def ppl_against_budget(report: dict[str, Any], path: Path) -> Figure:
    """Perplexity of each policy against its budget, a panel a text, the full cache dashed.

    Args:
        report: ``{"budgets": [tokens], "rows": {policy: {text: [perplexity a budget]}},
            "full": {text: perplexity}}``.
        path: the PNG.
    """
    texts = list(report["full"])
    budgets = report["budgets"]
    figure, panels = _figure(1, len(texts))
    styles = _styles(report["rows"])
    for axes, text in zip(panels, texts, strict=True):
        for policy, row in report["rows"].items():
            axes.plot(budgets, row[text], label=policy, **styles[policy])
        axes.axhline(report["full"][text], color=GREY, linestyle="--", label="full cache")
        axes.set_xscale("log")
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_title(text)
        axes.set_xlabel("KV budget (tokens, log scale)")
        axes.grid(axis="y", color="#E5E5E5")
    panels[0].set_ylabel("perplexity")
    _legend(figure, panels[0])
    return _save(figure, path)


def loss_by_distance(report: dict[str, Any], path: Path) -> Figure:
    """What each row loses beyond "full", by position in the document, a panel a text.

    Args:
        report: of ``benchmarks/quality.py``.
        path: the PNG.

    Raises:
        ValueError: the report has no row "full".
    """
    rows = report["rows"]
    if "full" not in rows:
        raise ValueError(f"rows {', '.join(rows)}; a row full is what they are compared with")
    texts = list(rows["full"]["loss_by_distance"])
    others = [name for name in rows if name != "full"]
    figure, panels = _figure(1, len(texts))
    styles = _styles(others)
    for axes, text in zip(panels, texts, strict=True):
        positions, full = np.array(rows["full"]["loss_by_distance"][text], dtype=float).T
        for name in others:
            _, losses = np.array(rows[name]["loss_by_distance"][text], dtype=float).T
            axes.plot(positions, losses - full, label=name, **styles[name])
        axes.axhline(0, color=GREY, linestyle="--", label="full")
        axes.set_title(text)
        axes.set_xlabel("position in the document (tokens, start of bucket)")
        axes.grid(axis="y", color="#E5E5E5")
    panels[0].set_ylabel("loss above full (nats per token)")
    _share_y(panels)
    _legend(figure, panels[0])
    return _save(figure, path)


def retention_map(retention: dict[str, Any] | Sequence[dict[str, Any]], path: Path) -> Figure:
    """Which blocks live, as a request grows: a panel a policy, the first at the top.

    Args:
        retention: ``{"policy": name, "block_size": tokens, "points": [computed tokens],
            "kept": [[logical blocks kept after that point]]}``, or several of them.
        path: the PNG.

    Raises:
        ValueError: there is no point, or not one list of blocks for each.
    """
    maps = [retention] if isinstance(retention, dict) else list(retention)
    figure, panels = _figure(len(maps), 1, width=7.0, height=2.6)
    for axes, of in zip(panels, maps, strict=True):
        edges, states = _states(of)
        axes.pcolormesh(
            edges,
            np.arange(len(states) + 1),
            states,
            cmap=ListedColormap([ABSENT, EVICTED, KEPT]),
            vmin=0,
            vmax=2,
            rasterized=True,
        )
        axes.set_title(of["policy"])
        axes.set_ylabel(f"logical block\n({of['block_size']} tokens each)")
    panels[-1].set_xlabel("computed tokens")
    handles = [Patch(color=KEPT, label="in the cache"), Patch(color=EVICTED, label="evicted")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path)


def _states(retention: dict[str, Any]) -> tuple[Any, Any]:
    """Edges in computed tokens [points + 1], and 0 absent, 1 evicted, 2 kept [blocks, points]."""
    points, kept = retention["points"], retention["kept"]
    if not points or len(points) != len(kept):
        raise ValueError(
            f"{len(points)} points with {len(kept)} lists of blocks; allowed: one each"
        )
    num_blocks = -(-np.array(points) // retention["block_size"])  # [points]
    states = (np.arange(num_blocks.max())[:, None] < num_blocks[None, :]).astype(np.uint8)
    for i, blocks in enumerate(kept):
        states[list(blocks), i] = 2
    # A state lasts from its point to the next; the last as long as the one before.
    step = points[-1] - points[-2] if len(points) > 1 else retention["block_size"]
    return np.array([*points, points[-1] + step]), states


def _figure(
    num_rows: int, num_columns: int, width: float = PANEL_WIDTH, height: float = PANEL_HEIGHT
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels; width and height of one in inches."""
    figure = Figure(
        figsize=(width * num_columns, height * num_rows + 0.6), dpi=DPI, layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, sharex=num_columns == 1, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels.flat)


def _styles(names: Sequence[str] | dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A line's look by row: a colour and a marker a policy, NF4 weights dotted and hollow."""
    policies = dict.fromkeys(name.removeprefix(NF4) for name in names)
    policies.pop("full", None)
    looks = dict(zip(policies, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    looks["full"] = GREY, "x"  # as the dashed line
    styles = {}
    for name in names:
        colour, marker = looks[name.removeprefix(NF4)]
        styles[name] = {"color": colour, "marker": marker, "markersize": 5}
        if name.startswith(NF4):
            styles[name] |= {"linestyle": ":", "markerfacecolor": "white"}
    return styles


def _share_y(panels: list[Axes]) -> None:
    """One scale of y for all panels."""
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, high)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: Figure, path: Path) -> Figure:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return figure
