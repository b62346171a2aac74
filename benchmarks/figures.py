"""The figures of speed: stock vLLM and the policy take turns in one run."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_semantic.recall import RECALL_BLOCKS, RECALL_GIB

from . import overhead
from .context import MODEL, RESULTS, context
from .engines import RemoteEngine, engine

SEMANTIC = "semantic"
HOST_REQUESTS = (1, 32, 128, 256, 512)
HOST_TOKENS = 1024
BLOCK_SIZE = 32
BASE = {
    "dtype": "bfloat16",
    "block_size": BLOCK_SIZE,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "hf_overrides": {"max_position_embeddings": 8192},
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
}
"""Speed does not depend on what the weights say, so the shape of a model is enough."""


def run(
    model: str = str(MODEL),
    rounds: int = 4,
    out: Path = RESULTS / "figures.json",
    only: list[str] | None = None,
) -> None:
    """Measure the figures and write them with their context.

    ``only`` measures some tasks afresh and leaves the other results in the file as they are;
    each task's detail says when it was measured.
    """
    console = Console()
    tasks = {name: task for name, task in TASKS.items() if not only or name in only}
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"details": {}}
    report["context"] = context(model, rounds=rounds, block_size=BLOCK_SIZE, dtype="bfloat16")
    for name, task in tasks.items():
        console.print(f"[bold]{name}[/]: {(task.__doc__ or '').splitlines()[0]}")
        found, detail = task(model, rounds)
        report |= found
        report["details"][name] = {"date": report["context"]["date"], **detail}
        for figure, value in found.items():
            console.print(f"  {figure} = {value:.4g}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title="Figures")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    for name, value in report.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    console.print(table)


def add(
    found: dict[str, Any], settings: dict[str, Any], task: str, out: Path = RESULTS / "figures.json"
) -> None:
    """Put another task's figures into the file, with their context among the details."""
    report = json.loads(out.read_text()) if out.exists() else {"details": {}}
    report |= found
    report["details"][task] = settings
    out.write_text(json.dumps(report, indent=1) + "\n")


def no_eviction(model: str, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Throughput with a budget that is never reached, over stock vLLM's."""
    prompts = random_tokens(32, 128)
    kwargs = BASE | {"max_model_len": 1024}
    with (
        engine(model, **kwargs) as stock,
        engine(model, SEMANTIC, {"semantic_tokens": 4096}, **kwargs) as policy,
    ):
        sides = {"stock": stock, "semantic": policy}
        speeds = alternate(sides, 3 * rounds, lambda side: tokens_per_second(side, prompts, 256))
        assert policy.stats()["evicted_blocks"] == 0
    return {"no_eviction_throughput_ratio": ratio(speeds, "semantic", "stock")}, speeds


def kv_bound(model: str, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Throughput of 64 requests x 1500 new tokens on a pool for 8 full ones, over stock's."""
    num_requests, num_prompt, num_new, num_full = 64, 36, 1500, 8
    blocks_per_request = -(-(num_prompt + num_new) // BLOCK_SIZE)
    prompts = random_tokens(num_requests, num_prompt)
    kwargs = BASE | {
        "max_model_len": 2048,
        "max_num_seqs": num_requests,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": num_full * blocks_per_request + 1,
    }
    ample = kwargs | {"num_gpu_blocks_override": num_requests * blocks_per_request + 1}
    preemptions: dict[str, list[float]] = {"stock": [], "semantic": [], "stock, ample pool": []}
    with (
        engine(model, **kwargs) as stock,
        engine(model, SEMANTIC, **kwargs) as policy,
        engine(model, **ample) as ideal,
    ):
        sides = {"stock": stock, "semantic": policy, "stock, ample pool": ideal}

        def measure(side: RemoteEngine) -> float:
            measured = side.generate(prompts, num_new)
            name = next(name for name, known in sides.items() if known is side)
            preemptions[name].append(measured["preemptions"])
            return measured["tokens"] / measured["seconds"]

        # Minutes a side and thousands of steps: one round, and nothing to warm up.
        speeds = alternate(sides, max(1, rounds // 4), measure, warm_up=0)
        evicted = policy.stats()["evicted_blocks"]
        assert evicted > 0, "nothing was evicted: the figure would say nothing"
    return (
        {
            "kv_bound_throughput_ratio": ratio(speeds, "semantic", "stock"),
            "kv_bound_ideal_ratio": ratio(speeds, "stock, ample pool", "stock"),
        },
        speeds | {"preemptions": preemptions, "evicted_blocks": evicted},
    )


def decode_cost(model: str, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Time of a decode step at 4k of context over 512, and what of it scoring takes."""
    num_requests, num_steps = 8, 6 * BLOCK_SIZE
    prompts = {
        length: random_tokens(num_requests, length - num_steps // 2) for length in (512, 4096)
    }
    kwargs = BASE | {"max_model_len": 8192}
    with engine(model, **kwargs) as stock, engine(model, SEMANTIC, **kwargs) as policy:
        times: dict[str, list[float]] = {}
        for length, tokens in prompts.items():
            measured = alternate(
                {"stock": stock, "semantic": policy},
                rounds,
                lambda side, tokens=tokens: side.decode_steps(tokens, num_steps)["seconds"],
            )
            times |= {f"{name} at {length}": values for name, values in measured.items()}
        shares = [
            policy.decode_steps(prompts[4096], num_steps, instrument=True) for _ in range(rounds)
        ]
        assert policy.stats()["evicted_blocks"] > 0

    def fastest(name: str) -> float:
        return min(times[name])

    parts = {
        name: statistics.median(share[name] for share in shares)
        for name in ("scoring", "eviction", "compaction")
    }
    return (
        {
            # The fastest round of each: the lengths cannot take turns, so drift does not cancel.
            "decode_flatness_4k_over_512": fastest("semantic at 4096") / fastest("semantic at 512"),
            "decode_flatness_4k_over_512_stock": fastest("stock at 4096") / fastest("stock at 512"),
            "scoring_share_of_step": parts["scoring"] + parts["eviction"],
            "compaction_share_of_step": parts["compaction"],
        },
        times | {"shares_at_4096": shares},
    )


def host_step(model: str, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The scheduler's part of a step over stock vLLM's, in CPU time: no model, no kernels."""
    cells = [overhead.measure(model, n, HOST_TOKENS, 2 * rounds + 1) for n in HOST_REQUESTS]
    ratios = {cell["num_reqs"]: cell["scheduler_ratio"] for cell in cells}
    return (
        {
            "host_step_over_stock_idle_256": ratios[256]["ample"],
            "host_step_over_stock_evicting_256": ratios[256]["semantic"],
        },
        {"num_tokens": HOST_TOKENS, "cells": cells},
    )


def recall_cost(model: str, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """A decode step with host memory for evicted blocks over one without."""
    num_requests, num_steps = 4, 6 * BLOCK_SIZE
    kwargs = BASE | {"max_model_len": 20480}
    kwargs["hf_overrides"] = {"max_position_embeddings": 20480}
    kept = {RECALL_GIB: 2}
    with (
        engine(model, SEMANTIC, **kwargs) as without,
        engine(model, SEMANTIC, kept, **kwargs) as keeping,
        engine(model, SEMANTIC, kept | {RECALL_BLOCKS: 2}, **kwargs) as recalling,
    ):
        sides = {"without": without, "kept": keeping, "recalled": recalling}
        times: dict[str, list[float]] = {}
        for length in (4096, 16384):
            tokens = random_tokens(num_requests, length - num_steps // 2)
            measured = alternate(
                sides,
                rounds,
                lambda side, tokens=tokens: side.decode_steps(tokens, num_steps)["seconds"],
            )
            times |= {f"{name} at {length}": values for name, values in measured.items()}
        stats = {name: side.stats() for name, side in sides.items()}
    assert stats["kept"]["copied_blocks"] > 0
    assert stats["recalled"]["recalled_blocks"] > 0
    return (
        {
            "recall_decode_over_without_4k": ratio(times, "kept at 4096", "without at 4096"),
            "recall_decode_over_without_16k": ratio(times, "kept at 16384", "without at 16384"),
            "recall_in_answers_over_without_16k": ratio(
                times, "recalled at 16384", "without at 16384"
            ),
        },
        times | {"stats": stats},
    )


TASKS = {
    task.__name__: task for task in (no_eviction, kv_bound, decode_cost, host_step, recall_cost)
}
"""Each may be measured by itself."""


def alternate(
    sides: dict[str, RemoteEngine],
    rounds: int,
    measure: Callable[[RemoteEngine], float],
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Let the sides take turns, after rounds that only warm up."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(-warm_up, rounds):
        for name, side in sides.items():
            value = measure(side)
            if i >= 0:
                values[name].append(value)
    return values


def ratio(values: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the ratios of each round: what drifts between rounds cancels."""
    return statistics.median(a / b for a, b in zip(values[over], values[under], strict=True))


def tokens_per_second(side: RemoteEngine, prompts: list[list[int]], num_new: int) -> float:
    """Generated tokens a second of one batch."""
    measured = side.generate(prompts, num_new)
    return measured["tokens"] / measured["seconds"]


def random_tokens(num_requests: int, length: int, vocab_size: int = 4000) -> list[list[int]]:
    """Prompts that share nothing."""
    generator = random.Random(length)
    return [
        [generator.randrange(8, vocab_size) for _ in range(length)] for _ in range(num_requests)
    ]
