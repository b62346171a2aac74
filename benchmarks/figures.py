"""The figures of speed: stock vLLM and the policy take turns in one run."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_semantic.recall import RECALL_BLOCKS, RECALL_GIB

from . import overhead
from .context import MODEL, RESULTS, context
from .engines import RemoteEngine, engine

SEMANTIC = "semantic"
HOST_TOKENS = 1024
HOST_REQUESTS = 256
"""Of the figures; the detail has other sizes."""
CAPACITY_SIDES = {"stock": None, "streaming": "streaming", "semantic": SEMANTIC}
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


@dataclass(frozen=True)
class Sizes:
    """How much each task measures; figures are named after these."""

    idle_requests: int = 32
    idle_tokens: int = 256
    """That each of them generates, with a budget that is never reached."""
    bound_requests: int = 64
    bound_tokens: int = 1500
    bound_full: int = 8
    """Requests that the pool holds in full."""
    decode_contexts: tuple[int, int] = (512, 4096)
    recall_contexts: tuple[int, int] = (4096, 16384)
    decode_steps: int = 6 * BLOCK_SIZE
    host_requests: tuple[int, ...] = (1, 32, 128, 256, 512)
    capacity_contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    capacity_kv_bytes: int = 112 << 20
    """A little more than one request of the longest context needs."""
    capacity_prompt_tokens: int = 1 << 17
    """Of all requests of a side: it is measured with fewer where reading more would take long."""


QUICK = Sizes(
    idle_requests=2,
    idle_tokens=8,
    bound_requests=6,
    bound_tokens=300,
    bound_full=2,
    decode_contexts=(400, 600),
    recall_contexts=(500, 1600),
    decode_steps=BLOCK_SIZE,
    host_requests=(1, 32, 256),
    capacity_contexts=(512, 1024),
    capacity_kv_bytes=16 << 20,
    capacity_prompt_tokens=4096,
)
"""Shows that everything runs, and nothing else."""


def run(
    model: str = str(MODEL),
    rounds: int = 4,
    out: Path | None = RESULTS / "figures.json",
    only: list[str] | None = None,
    sizes: Sizes = Sizes(),
) -> dict[str, Any]:
    """Measure the figures and write them with their context.

    Args:
        model: the shape; weights are random, but where blocks come back.
        rounds: in which stock vLLM and the policy take turns.
        out: written after each task, if at all.
        only: measures these tasks afresh and leaves the other results in the file as they are;
            each task's detail says when it was measured. ``None``: all.
        sizes: of the tasks.
    """
    console = Console()
    tasks = {name: task for name, task in TASKS.items() if not only or name in only}
    report: dict[str, Any] = {"details": {}}
    if out and out.exists():
        report = json.loads(out.read_text())
    report["context"] = context(model, rounds=rounds, block_size=BLOCK_SIZE, dtype="bfloat16")
    for name, task in tasks.items():
        console.print(f"[bold]{name}[/]: {(task.__doc__ or '').splitlines()[0]}")
        found, detail = task(model, rounds, sizes)
        report |= found
        report["details"][name] = {"date": report["context"]["date"], **detail}
        for figure, value in found.items():
            console.print(f"  {figure} = {value:.4g}")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title="Figures")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    for name, value in report.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    console.print(table)
    return report


def add(
    found: dict[str, Any], settings: dict[str, Any], task: str, out: Path = RESULTS / "figures.json"
) -> None:
    """Put another task's figures into the file, with their context among the details."""
    report = json.loads(out.read_text()) if out.exists() else {"details": {}}
    report |= found
    report["details"][task] = settings
    out.write_text(json.dumps(report, indent=1) + "\n")


Found = tuple[dict[str, float], dict[str, Any]]
"""Figures of a task, and what they come from."""


def no_eviction(model: str, rounds: int, sizes: Sizes) -> Found:
    """Throughput with a budget that is never reached, over stock vLLM's."""
    prompts = random_tokens(sizes.idle_requests, 128)
    kwargs = BASE | {"max_model_len": 1024}
    with (
        engine(model, **kwargs) as stock,
        engine(model, SEMANTIC, {"semantic_tokens": 4096}, **kwargs) as policy,
    ):
        sides = {"stock": stock, "semantic": policy}
        speeds = alternate(
            sides, 3 * rounds, lambda side: tokens_per_second(side, prompts, sizes.idle_tokens)
        )
        assert policy.stats()["evicted_blocks"] == 0
    return {"no_eviction_throughput_ratio": ratio(speeds, "semantic", "stock")}, speeds


def kv_bound(model: str, rounds: int, sizes: Sizes) -> Found:
    """Throughput of 64 requests x 1500 new tokens on a pool for 8 full ones, over stock's."""
    num_requests, num_prompt, num_new = sizes.bound_requests, 36, sizes.bound_tokens
    num_full = sizes.bound_full
    blocks_per_request = -(-(num_prompt + num_new) // BLOCK_SIZE)
    prompts = random_tokens(num_requests, num_prompt)
    kwargs = BASE | {
        "max_model_len": blocks_per_request * BLOCK_SIZE,
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


def decode_cost(model: str, rounds: int, sizes: Sizes) -> Found:
    """Time of a decode step at 4k of context over 512, and what of it scoring takes."""
    num_requests, num_steps = 8, sizes.decode_steps
    short, long = sizes.decode_contexts
    prompts = {
        length: random_tokens(num_requests, length - num_steps // 2) for length in (short, long)
    }
    # For all requests of a model that is asked for, too.
    kwargs = BASE | {"max_model_len": 8192, "kv_cache_memory_bytes": 1 << 30}
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
            policy.decode_steps(prompts[long], num_steps, instrument=True) for _ in range(rounds)
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
            "decode_flatness_4k_over_512": fastest(f"semantic at {long}")
            / fastest(f"semantic at {short}"),
            "decode_flatness_4k_over_512_stock": fastest(f"stock at {long}")
            / fastest(f"stock at {short}"),
            "scoring_share_of_step": parts["scoring"] + parts["eviction"],
            "compaction_share_of_step": parts["compaction"],
        },
        times | {"shares_at_4096": shares},
    )


def host_step(model: str, rounds: int, sizes: Sizes) -> Found:
    """The scheduler's part of a step over stock vLLM's, in CPU time: no model, no kernels."""
    in_groups = overhead.sides_in_groups()
    cells = [
        overhead.measure(
            model,
            num_reqs,
            HOST_TOKENS,
            2 * rounds + 1,
            overhead.SIDES | (in_groups if num_reqs == HOST_REQUESTS else {}),
        )
        for num_reqs in sizes.host_requests
    ]
    ratios = {cell["num_reqs"]: cell["scheduler_ratio"] for cell in cells}[HOST_REQUESTS]
    return (
        {
            "host_step_over_stock_idle_256": ratios["ample"],
            "host_step_over_stock_evicting_256": ratios["semantic"],
            **{
                f"host_step_over_stock_evicting_256_{n}_groups": ratios[name]
                for n, name in zip(overhead.GROUPS, in_groups, strict=True)
            },
        },
        {"num_tokens": HOST_TOKENS, "cells": cells},
    )


def recall_cost(model: str, rounds: int, sizes: Sizes) -> Found:
    """A decode step with host memory for evicted blocks over one without."""
    num_requests, num_steps = 4, sizes.decode_steps
    short, long = sizes.recall_contexts
    # Prompts are read in parts, so that there is something to come back.
    kwargs = BASE | {"max_model_len": 20480, "max_num_batched_tokens": min(2048, long // 4)}
    kwargs["hf_overrides"] = {"max_position_embeddings": 20480}
    kwargs["load_format"] = "auto"  # to random weights the same blocks matter all the time
    kept = {RECALL_GIB: 2}
    with (
        engine(model, SEMANTIC, **kwargs) as without,
        engine(model, SEMANTIC, kept, **kwargs) as keeping,
        engine(model, SEMANTIC, kept | {RECALL_BLOCKS: 2}, **kwargs) as recalling,
    ):
        sides = {"without": without, "kept": keeping, "recalled": recalling}
        times: dict[str, list[float]] = {}
        for length in (short, long):
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
            "recall_decode_over_without_4k": ratio(
                times, f"kept at {short}", f"without at {short}"
            ),
            "recall_decode_over_without_16k": ratio(times, f"kept at {long}", f"without at {long}"),
            "recall_in_answers_over_without_16k": ratio(
                times, f"recalled at {long}", f"without at {long}"
            ),
        },
        times | {"stats": stats},
    )


def capacity(model: str, rounds: int, sizes: Sizes) -> Found:
    """How many requests a given KV memory holds, and what they decode."""
    contexts, step_tokens, max_num_seqs = sizes.capacity_contexts, 2048, 128
    num_steps = (1 + rounds) * BLOCK_SIZE
    kwargs = BASE | {
        "max_model_len": max(contexts) + BLOCK_SIZE * 64,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": step_tokens,
        "kv_cache_memory_bytes": sizes.capacity_kv_bytes,
        "hf_overrides": {"max_position_embeddings": max(contexts) + BLOCK_SIZE * 64},
    }
    rows = {}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(engine(model, policy, **kwargs))
            for name, policy in CAPACITY_SIDES.items()
        }
        for num_tokens in contexts:
            most = min(max_num_seqs, max(1, sizes.capacity_prompt_tokens // num_tokens))
            fits = {name: side.fits(num_tokens) for name, side in sides.items()}
            served = {name: min(count, most) for name, count in fits.items()}
            for name, side in sides.items():
                # The first to be read decode on while the last are read.
                num_reading = served[name] * num_tokens // step_tokens + 8
                prompts = random_tokens(served[name], num_tokens - num_steps - num_reading)
                side.start_decoding(prompts, num_steps)
            seconds = alternate(sides, rounds, lambda side: side.decode(BLOCK_SIZE))
            for side in sides.values():
                side.stop_decoding()
            speeds = {
                name: [served[name] * BLOCK_SIZE / one for one in of]
                for name, of in seconds.items()
            }
            rows[str(num_tokens)] = {
                "fits": fits,
                "served": served,
                "tokens_per_second": {n: statistics.median(of) for n, of in speeds.items()},
                "over_stock": {name: ratio(speeds, name, "stock") for name in sides},
                "rounds": speeds,
            }
    longest = rows[str(max(contexts))]["over_stock"][SEMANTIC]
    detail = {"kv_bytes": sizes.capacity_kv_bytes, "max_num_seqs": max_num_seqs, "rows": rows}
    return {"capacity_semantic_over_stock_32k": longest}, detail


TASKS = {
    task.__name__: task
    for task in (no_eviction, kv_bound, decode_cost, host_step, recall_cost, capacity)
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
