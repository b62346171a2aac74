"""Rings of queries: whatever a batch looks like, each query has the place its token says."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.engine.query_windows import QueryWindows, num_drafts_in_flight


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30), st.booleans()), max_size=6),
)
def test_the_last_queries_of_each_request_are_kept_where_they_are_wanted(
    num_queries: int, batch: list[tuple[int, int, bool]]
) -> None:
    windows = QueryWindows(num_queries, max_num_reqs=6)
    names = [str(i) for i in range(len(batch))]
    wanted = {name for name, (*_, looked_at) in zip(names, batch, strict=True) if looked_at}
    starts = np.cumsum([0, *(new for new, *_ in batch)])
    ends = np.array([new + before for new, before, _ in batch])
    places = windows.place(wanted, names, starts, ends)
    kept = {row: source for source, row in places.tolist()}
    assert len(kept) == len(places) == sum(min(new, num_queries) * w for new, _, w in batch)
    assert all(0 <= row < windows.num_rows for row in kept)
    for i, (new, _, looked_at) in enumerate(batch):
        if not looked_at:
            continue
        end = int(ends[i])
        shown = windows.window(names[i], end, num_queries)
        assert len(shown) == min(num_queries, end)
        assert windows.window(names[i], end, 1) == shown[-1:]
        in_step = min(new, num_queries)
        expected = list(range(int(starts[i + 1]) - in_step, int(starts[i + 1])))
        assert [kept[row] for row in shown[-in_step:]] == expected


def test_rings_are_used_again() -> None:
    windows = QueryWindows(4, max_num_reqs=2)
    first = windows.window("a", 1, 1)[0] // 4
    windows.window("b", 1, 1)
    with pytest.raises(IndexError):
        windows.window("c", 1, 1)
    windows.forget(["a", "never seen"])
    assert windows.window("c", 1, 1)[0] // 4 == first


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_guesses", [1, 4])
def test_guesses_take_no_place_that_is_looked_at(num_guesses: int, steps_in_flight: int) -> None:
    """Of a session whose turn ends among the tokens of a step, with the next step in flight; its
    next turn is short."""
    config: Any = SimpleNamespace(
        num_speculative_tokens=num_guesses, max_concurrent_batches=steps_in_flight
    )
    num_queries, of_step, begin = 8, 1 + num_guesses, 40
    for length, of_turn in itertools.product(range(1, of_step + 1), range(1, 2 * of_step + 1)):
        windows = QueryWindows(num_queries, 1, num_drafts_in_flight(config))
        kept = {}
        spans = [(0, begin)]
        spans += [(begin + i * of_step, begin + (i + 1) * of_step) for i in range(steps_in_flight)]
        end = begin + length + of_turn
        for first, last in [*spans, (begin + length, end)]:
            starts, ends = np.array([0, last - first]), np.array([last])
            for source, row in windows.place({"a"}, ["a"], starts, ends).tolist():
                kept[row] = first + source
        shown = [kept[row] for row in windows.window("a", end, num_queries)]
        assert shown == list(range(end - num_queries, end))
