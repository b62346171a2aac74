"""The beginning of a soak, see ``python -m tests.soak``, and the end of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ..server import Server
from ..soak.clients import Plan, Soak, failures
from ..soak.work import ENVIRONMENT, FLAGS, catalogue


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("soak") / "log"
    with Server(repo / "models" / "lookback-5m", log, FLAGS, ENVIRONMENT) as server:
        server.wait()
        yield server


def test_requests_hang_ups_and_a_restart(server: Server, repo: Path) -> None:
    plan = Plan(requests=36, minutes=5, restarts=1)
    works = catalogue(14, plan.seed, repo / "benchmarks" / "texts" / "pg19")

    async def soak() -> dict[str, Any]:
        return await Soak(plan, server, works).run()

    result = asyncio.run(soak())
    assert failures(result) == []
    assert result["finished"]["equal"] > 18
    assert sum(result["hung_up"].values()) > 3
    assert sum(result["retried"].values()) > 0


def test_a_killed_worker_ends_the_server(server: Server, repo: Path) -> None:
    """With an error for whoever waits, as without a policy; the last test of its server."""
    book = next((repo / "benchmarks" / "texts" / "pg19").glob("*.txt")).read_text()
    stream = server.client.completions.create(
        model=server.model,
        prompt=book[:2400],
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    worker = max(server.children(), key=lambda process: process.memory_info().rss)
    worker.kill()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert server.process.wait(60) is not None
