"""Clients that ask, wait, hang up and try again, and whoever restarts their server."""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import openai
import psutil

from ..server import HOST_MIB, Server
from .work import Answer, Work

UNREACHABLE = (openai.APIError, httpx.HTTPError)  # also as an event of a stream that has begun

SECONDS_TO_EXIT = 5
"""After SIGTERM; then the API server is killed. vLLM 0.32 ends the engine at once, but waits for
streams that nobody feeds any more, with a policy and without."""

RSS_GROWTH_MIB = 64 + HOST_MIB
"""Allowed between a quarter of a server's life and its end, all its processes together: what host
memory takes as it fills, and 64."""


@dataclass(frozen=True)
class Plan:
    """How long, how many, how wild; it ends with whichever comes first."""

    requests: int
    minutes: float
    clients: int = 12
    restarts: int = 2
    hang_up: float = 0.2
    seed: int = 0
    host_mib: int = HOST_MIB
    """Of host memory for evicted blocks. With less than :data:`HOST_MIB` it may be full: then what
    a request recalls, and so what it says, may depend on others."""


@dataclass
class Life:
    """One server process."""

    rss_at_quarter: float = 0.0
    rss_at_end: float = 0.0
    preemptions: int = 0
    evicted_blocks: int = 0
    recalled_blocks: int = 0
    dropped_blocks: int = 0
    """Evicted blocks that requests could no longer have back."""
    host_mib: float = 0.0
    generated_tokens: int = 0
    seconds_to_exit: float | None = None
    killed: bool = False
    outlived_by: int = 0
    """Processes of its engine that were still there when it had gone."""


@dataclass
class Counts:
    """What became of the requests."""

    finished: Counter[str] = field(default_factory=Counter)
    """By comparison with the answer alone."""
    hung_up: Counter[str] = field(default_factory=Counter)
    """By when, and by comparison of what had come."""
    retried: Counter[str] = field(default_factory=Counter)
    """By why; all of them while the server was restarted."""
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


class Soak:
    """One run.

    Args:
        plan: what to do.
        server: serves already.
        works: what to ask for.
    """

    def __init__(self, plan: Plan, server: Server, works: list[Work]) -> None:
        self.plan, self.server, self.works = plan, server, works
        self.counts, self.lives = Counts(), [Life()]
        self.num_started = 0
        self.num_done = 0
        self.up = asyncio.Event()
        self.up.set()
        self.finished = asyncio.Event()
        self.client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0
        )

    async def run(self) -> dict[str, Any]:
        """Ask alone, then all at once; what happened, for JSON."""
        self.answers = [await self._alone(work) for work in self.works]
        self.began = time.monotonic()
        keeper = asyncio.create_task(self._keep_server())
        generators = (random.Random(f"{self.plan.seed} {i}") for i in range(self.plan.clients))
        await asyncio.gather(*map(self._client, generators))
        self.finished.set()
        await keeper
        await asyncio.to_thread(self.server.wait_until_idle)
        minutes = (time.monotonic() - self.began) / 60
        await asyncio.to_thread(self._note_end)
        await self.client.close()
        return {
            "plan": asdict(self.plan),
            "different_requests": len(self.works),
            "minutes": round(minutes, 1),
            "requests": self.num_done,
            **vars(self.counts),
            "kv_cache_usage_at_end": self.server.metric("vllm:kv_cache_usage_perc"),
            "alive_at_end": self.server.process.poll() is None,
            "lives": [asdict(life) for life in self.lives],
            "fallbacks_logged": self.server.log.read_text().count("cannot choose among the blocks"),
        }

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        elapsed = (time.monotonic() - self.began) / 60
        return max(self.num_done / self.plan.requests, elapsed / self.plan.minutes)

    # -- clients -----------------------------------------------------------------------

    async def _alone(self, work: Work) -> Answer:
        answer = await self.client.completions.create(
            model=self.server.model, logprobs=2, **work.arguments
        )
        return Answer.of(answer)

    async def _client(self, generator: random.Random) -> None:
        while self.num_started < self.plan.requests and self.progress < 1:
            self.num_started += 1
            which = generator.randrange(len(self.works))
            # None: to the end. 0: before the first token. Else after so many chunks.
            hang_up_after = None
            if generator.random() < self.plan.hang_up:
                most = self.works[which].max_tokens // 2
                hang_up_after = generator.choice([0, generator.randint(1, max(1, most))])
            patience = generator.uniform(0, 0.3)
            while not await self._attempt(which, hang_up_after, patience):
                pass
            self.num_done += 1

    async def _attempt(self, which: int, hang_up_after: int | None, patience: float) -> bool:
        """Ask once; false if it was in vain because the server was restarted meanwhile."""
        await self.up.wait()
        life = len(self.lives)
        tokens: list[int] = []
        reason = None
        try:
            stream = await self.client.completions.create(
                model=self.server.model, stream=True, **self.works[which].arguments
            )
            if hang_up_after == 0:
                await asyncio.sleep(patience)
                await stream.close()
                self.counts.hung_up["before a token"] += 1
                return True
            num_chunks = 0
            async for chunk in stream:
                tokens += chunk.choices[0].token_ids or []
                reason = chunk.choices[0].finish_reason
                num_chunks += 1
                if num_chunks == hang_up_after:
                    await stream.close()
                    break
        except UNREACHABLE as error:
            return self._excused(life, type(error).__name__)
        if hang_up_after is None and reason != "length":
            return self._excused(life, f"finish_reason {reason}")
        self._compare(which, tokens, hung_up=reason is None)
        return True

    def _excused(self, life: int, why: str) -> bool:
        """Whether to try again: not if it happened for no reason."""
        if self.up.is_set() and life == len(self.lives):
            self.counts.lost.append(why)
            return True
        self.counts.retried[why] += 1
        return False

    def _compare(self, which: int, tokens: list[int], hung_up: bool) -> None:
        answer = self.answers[which]
        outcome = answer.compare(tokens)
        if not hung_up and outcome == "equal" and len(tokens) < len(answer.token_ids):
            outcome = "too short"
        if outcome not in ("equal", "near tie"):
            self.counts.different.append(f"request {which}: {outcome}")
            outcome = "different"
        if hung_up:
            self.counts.hung_up[f"among tokens, {outcome}"] += 1
        else:
            self.counts.finished[outcome] += 1

    # -- the server --------------------------------------------------------------------

    async def _keep_server(self) -> None:
        """Restart it a few times under load, and look at its memory."""
        width = 1 / (self.plan.restarts + 1)
        while not self.finished.is_set():
            await asyncio.sleep(0.2)
            life, start = self.lives[-1], (len(self.lives) - 1) * width
            if not life.rss_at_quarter and self.progress > start + width / 4:
                life.rss_at_quarter = await asyncio.to_thread(self.server.rss)
            if len(self.lives) <= self.plan.restarts and self.progress > start + width:
                await asyncio.to_thread(self._note_end)
                self.up.clear()
                await asyncio.to_thread(self._restart)
                self.up.set()

    def _note_end(self) -> None:
        life = self.lives[-1]
        life.rss_at_end = self.server.rss()
        life.preemptions = int(self.server.metric("vllm:num_preemptions_total"))
        life.evicted_blocks = int(self.server.metric("vllm:kv_policy_evicted_blocks_total"))
        life.recalled_blocks = int(self.server.metric("vllm:kv_policy_recalled_blocks_total"))
        life.dropped_blocks = int(self.server.metric("vllm:kv_policy_dropped_blocks_total"))
        life.host_mib = self.server.metric("vllm:kv_policy_host_bytes") / 2**20
        life.generated_tokens = int(self.server.metric("vllm:generation_tokens_total"))

    def _restart(self) -> None:
        life, began = self.lives[-1], time.monotonic()
        engine = self.server.children()
        try:
            self.server.stop(SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            life.killed = True
        life.seconds_to_exit = round(time.monotonic() - began, 1)
        _, alive = psutil.wait_procs(engine, timeout=5)
        life.outlived_by = len(alive)
        self.lives.append(Life())
        self.server.start()
        self.server.wait()


def failures(result: dict[str, Any]) -> list[str]:
    """What should not have happened in a run."""
    lives = result["lives"]
    dropped = sum(life["dropped_blocks"] for life in lives)
    is_ample = result["plan"]["host_mib"] >= HOST_MIB
    wrong = {
        f"lost: {result['lost'][:5]}": result["lost"],
        f"different: {result['different'][:5]}": result["different"] and not dropped,
        "the server is dead": not result["alive_at_end"],
        "blocks are held at the end": result["kv_cache_usage_at_end"],
        "a policy failed": result["fallbacks_logged"],
        "SIGTERM did not end the engine": any(life["outlived_by"] for life in lives),
        "nothing was evicted": not all(life["evicted_blocks"] for life in lives),
        "nothing came back": not all(life["recalled_blocks"] for life in lives),
        "host memory lost what a request could recall": dropped and is_ample,
        "host memory was never full": not dropped and not is_ample,
        "nothing was preempted": not sum(life["preemptions"] for life in lives),
        "fewer restarts than planned": len(lives) <= result["plan"]["restarts"],
    }
    found = [what for what, is_so in wrong.items() if is_so]
    for life in lives:
        growth = life["rss_at_end"] - life["rss_at_quarter"]
        if life["rss_at_quarter"] and growth > RSS_GROWTH_MIB:
            found.append(f"resident memory grew by {growth:.0f} MiB")
    return found
