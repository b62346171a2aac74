"""Reading a log: whose evictions are drawn, and what is said where there are none."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_semantic.retention import NoEvictionsError, of_request, page, read, write

START = (
    "KV policy semantic: sink 8 + recent 64 + semantic 64 = 136 tokens, held as 5 blocks of 32 (160"
)
LOG = [
    "INFO something else",
    START,
    "KV policy semantic: request a at token 192 evicts blocks [2] of KV cache group 0; "
    "scores 1: 0.5, 2: 0.25, 3: 1e-05",
    "KV policy semantic: request b at token 192 evicts blocks [1, 2] of KV cache group 0; "
    "scores 1: 0.5, 2: nan",
    "KV policy semantic: request a at token 224 evicts blocks [] of KV cache group 1; scores ",
    "KV policy semantic: request a at token 192 evicts blocks [3] of KV cache group 0; "
    "scores 1: 0.5, 2: 0.25, 3: 1e-05",
]


def test_what_a_log_says() -> None:
    found, block_size = read(LOG)
    assert block_size == 32
    assert [(e.request, e.group, e.point, e.evicted) for e in found] == [
        ("a", 0, 192, (2,)),
        ("b", 0, 192, (1, 2)),
        ("a", 1, 224, ()),
        ("a", 0, 192, (3,)),
    ]
    assert found[0].scores == {1: 0.5, 2: 0.25, 3: 1e-05}
    assert found[2].scores == {}


def test_what_came_back_is_drawn() -> None:
    line = (
        "KV policy semantic: request a at token 256 evicts blocks [4] and recalls [2] of KV cache "
        "group 0; scores 4: 0.1"
    )
    found, _ = read([*LOG, line])
    assert (found[-1].evicted, found[-1].recalled) == ((4,), (2,))
    first, second = found[0], found[-1]
    drawn = page([first, second, replace(second, point=288, evicted=(), recalled=())], 32)
    assert "2 blocks went, 1 came back" in " ".join(drawn.split())
    cells = re.findall(r'y="(\d+)".*?fill="(#\w+)"><title>block (\d+),', drawn)
    of_block = {
        block: [fill for _, fill, drawn_block in cells if drawn_block == block] for block in "24"
    }
    assert of_block["2"][:2] == ["#d62728", "#2ca02c"]
    assert "#f4f4f4" not in of_block["2"]
    assert of_block["4"][1:] == ["#d62728", "#f4f4f4"]


def test_the_last_computation_of_a_request_counts() -> None:
    found, _ = read(LOG)
    assert [e.evicted for e in of_request(found)] == [(3,)]
    assert [e.evicted for e in of_request(found, "b")] == [(1, 2)]
    assert [e.point for e in of_request(found, "a", 1)] == [224]


@pytest.mark.parametrize(
    ("log", "asked", "message"),
    [
        (LOG, ("c", None), "no evictions of request c in .*; requests with some: a, b"),
        (LOG, ("b", 1), "no evictions of request b in KV cache group 1"),
        ([START], (None, None), "requests with some: none; is the level DEBUG?"),
        (LOG[2:], ("a", None), "no start line of a policy says how large a block is"),
    ],
)
def test_what_is_missing_is_named(
    log: list[str], asked: tuple[str | None, int | None], message: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("\n".join(log))
    with pytest.raises(NoEvictionsError, match=message):
        write(tmp_path / "log", tmp_path / "page.html", *asked)
    assert not (tmp_path / "page.html").exists()
