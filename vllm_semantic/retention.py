"""A picture of which blocks of one request lived, from the log of an engine.

The lines are those of ``vllm_semantic.engine.explain`` at level DEBUG. The picture is one HTML file
that needs nothing else.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

EVICTION = re.compile(
    r"KV policy (?P<policy>\S+): request (?P<request>\S+) at token (?P<point>\d+) evicts blocks "
    r"\[(?P<evicted>[\d, ]*)\](?: and recalls \[(?P<recalled>[\d, ]*)\])? "
    r"of KV cache group (?P<group>\d+); scores (?P<scores>.*)"
)
BLOCK_SIZE = re.compile(r"KV policy \S+: .* held as \d+ blocks of (\d+) ")

CELL = 9
"""Pixels of a block."""


@dataclass(frozen=True)
class Eviction:
    """One eviction point of a request in one group of layers."""

    policy: str
    request: str
    group: int
    point: int
    """Tokens computed."""
    evicted: tuple[int, ...]
    """Logical blocks that went."""
    recalled: tuple[int, ...]
    """Logical blocks that came back."""
    scores: dict[int, float]
    """Of the blocks that could have gone, by logical block."""


class NoEvictionsError(ValueError):
    """A log without what was asked for; the message says what it has."""


def read(lines: Iterable[str]) -> tuple[list[Eviction], int | None]:
    """The evictions in a log, and the size of a block in tokens if the log says it."""
    found: list[Eviction] = []
    block_size = None
    for line in lines:
        if match := EVICTION.search(line):
            pairs = (pair.split(": ") for pair in match["scores"].strip().split(", ") if pair)
            found.append(
                Eviction(
                    match["policy"],
                    match["request"],
                    int(match["group"]),
                    int(match["point"]),
                    _indices(match["evicted"]),
                    _indices(match["recalled"] or ""),
                    {int(i): float(score) for i, score in pairs},
                )
            )
        elif match := BLOCK_SIZE.search(line):
            block_size = int(match[1])
    return found, block_size


def _indices(text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in text.split(", ") if i)


def of_request(
    evictions: Iterable[Eviction], request: str | None = None, group: int | None = None
) -> list[Eviction]:
    """Those of one request in one group of layers, by the tokens computed.

    Args:
        evictions: of a log.
        request: its id; ``None``: the request with the most evictions.
        group: the KV cache group; ``None``: its first. A request that was preempted evicts again:
            the last of each point counts.

    Raises:
        NoEvictionsError: there are none.
    """
    evictions = list(evictions)
    requests = [e.request for e in evictions]
    chosen = request or max(requests, key=requests.count, default=None)
    groups = sorted({e.group for e in evictions if e.request == chosen})
    chosen_group = group if group is not None else next(iter(groups), None)
    by_point = {e.point: e for e in evictions if e.request == chosen and e.group == chosen_group}
    if not by_point:
        known = ", ".join(dict.fromkeys(requests)) or "none; is the level DEBUG?"
        raise NoEvictionsError(
            f"no evictions of request {request or '(any)'} in KV cache group "
            f"{'(any)' if group is None else group}; requests with some: {known}"
        )
    return [by_point[point] for point in sorted(by_point)]


def page(evictions: list[Eviction], block_size: int) -> str:
    """An HTML page: a row for each eviction point, a cell for each block of the sequence.

    Args:
        evictions: from :func:`of_request`; at least one.
        block_size: tokens of a block.
    """
    first, last = evictions[0], evictions[-1]
    num_columns = -(-last.point // block_size)
    width, height = num_columns * CELL, len(evictions) * CELL
    title = f"Request {first.request} under {first.policy}, KV cache group {first.group}"
    num_evicted = sum(len(e.evicted) for e in evictions)
    num_recalled = sum(len(e.recalled) for e in evictions)
    came_back = f", {num_recalled} came back" if num_recalled else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8" />
<title>{html.escape(title)}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; }}
svg {{ border: 1px solid #ccc; max-width: 100%; height: auto; }}
.key {{ display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.3em 0 1em; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{last.point} tokens in {num_columns} blocks of {block_size}; {num_evicted} blocks went{came_back}
at {len(evictions)} eviction points. A row is an eviction point, the first at the top; a column is a
block, the oldest at the left.</p>
<p><span class="key" style="background:#555"></span>kept as sink or recent
<span class="key" style="background:{_colour(0.0)}"></span>kept, low score
<span class="key" style="background:{_colour(1.0)}"></span>kept, high score
<span class="key" style="background:#d62728"></span>goes here
<span class="key" style="background:#2ca02c"></span>comes back here
<span class="key" style="background:#f4f4f4"></span>gone</p>
<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"
 xmlns="http://www.w3.org/2000/svg">
{chr(10).join(_cells(evictions, block_size))}
</svg>
</body>
</html>
"""


def write(log: Path, out: Path, request: str | None, group: int | None) -> str:
    """Draw a request from a log; a line that says what was drawn.

    Raises:
        NoEvictionsError: the log has none of it, or does not say how large a block is.
        OSError: a file cannot be read or written.
    """
    with log.open(encoding="utf-8", errors="replace") as lines:
        evictions, block_size = read(lines)
    chosen = of_request(evictions, request, group)
    if block_size is None:
        raise NoEvictionsError(f"{log}: no start line of a policy says how large a block is")
    out.write_text(page(chosen, block_size), encoding="utf-8")
    return f"{out}: request {chosen[0].request}, {len(chosen)} eviction points"


def _cells(evictions: list[Eviction], block_size: int) -> Iterator[str]:
    gone: set[int] = set()
    for row, eviction in enumerate(evictions):
        ranks = {
            i: r for r, i in enumerate(sorted(eviction.scores, key=eviction.scores.__getitem__))
        }
        for block in range(-(-eviction.point // block_size)):
            first = block * block_size
            score = eviction.scores.get(block)
            said = f"block {block}, tokens {first} to {first + block_size - 1}"
            if block in eviction.recalled:
                colour = "#2ca02c"
            elif block in gone:
                colour = "#f4f4f4"
            elif block in eviction.evicted:
                colour = "#d62728"
            elif score is None:
                colour = "#555"
            else:
                colour = _colour(ranks[block] / max(1, len(ranks) - 1))
            said += "" if score is None else f", score {score:.4g}"
            yield (
                f'<rect x="{block * CELL}" y="{row * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{colour}"><title>{said}; at token {eviction.point}</title></rect>'
            )
        gone = gone.union(eviction.evicted).difference(eviction.recalled)


def _colour(rank: float) -> str:
    """From pale to deep blue."""
    red, green, blue = (round(a + rank * (b - a)) for a, b in ((198, 8), (219, 48), (239, 107)))
    return f"#{red:02x}{green:02x}{blue:02x}"
