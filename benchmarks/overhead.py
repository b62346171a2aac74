"""What the plugin adds to a step on the host, by batch size, context and groups of layers."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_semantic.layer_groups import LAYER_GROUPS

from .context import MODEL, RESULTS, context

BLOCK_SIZE = 32
TOKENS_PER_STEP = 4096
BATCHES = (1, 8, 32, 128, 256, 512)
CONTEXTS = (512, 2048, 8192, 32768)
MAX_TOKENS = 1 << 22
"""Of all requests together: longer contexts are left out where there are more."""
GROUPS = (2, 4, 8)
"""Of layers that evict for themselves, beside one of all of them; at one context."""
GROUPS_CONTEXT = 2048
SIDES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "semantic": {"name": "semantic"},
    "ample": {"name": "semantic", "semantic_tokens": 1 << 20},
}
"""``ample``: a budget that is never reached."""


def run(
    model: str = str(MODEL),
    batches: tuple[int, ...] = BATCHES,
    contexts: tuple[int, ...] = CONTEXTS,
    rounds: int = 9,
    groups: tuple[int, ...] = GROUPS,
    out: Path = RESULTS / "overhead.json",
) -> dict[str, Any]:
    """Measure every batch size at every context and write it with its settings.

    A round is a block's worth of steps, in which every request loses one block. Prompts are
    staggered, so that requests evict at different steps. Seconds are of the thread's own CPU
    time: what else runs on the machine counts little.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    console = Console()
    in_groups = sides_in_groups(groups)
    cells = []
    for num_reqs, num_tokens in itertools.product(batches, contexts):
        if num_reqs * num_tokens <= MAX_TOKENS:
            sides = SIDES | (in_groups if num_tokens == GROUPS_CONTEXT else {})
            cells.append(measure(model, num_reqs, num_tokens, rounds, sides))
            console.print(f"{num_reqs} requests of {num_tokens} tokens")
    report = {
        "context": context(
            model,
            rounds=rounds,
            block_size=BLOCK_SIZE,
            sides=SIDES | in_groups,
            clock="thread CPU time",
        ),
        "cells": cells,
        "growth": growth(cells),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(_table(report))
    return report


def sides_in_groups(groups: Iterable[int] = GROUPS) -> dict[str, dict[str, Any] | None]:
    """Sides whose layers evict in groups of their own."""
    return {f"semantic, {n} groups": {"name": "semantic", LAYER_GROUPS: n} for n in groups}


def measure(
    model: str,
    num_reqs: int,
    num_tokens: int,
    rounds: int,
    policies: dict[str, dict[str, Any] | None] = SIDES,
) -> dict[str, Any]:
    """All sides at one size, in turns.

    Args:
        model: whose shape it is; no layer runs.
        num_reqs: all decoding.
        num_tokens: of context.
        rounds: of a block's worth of steps each, after one that only warms up.
        policies: by side, as ``additional_config`` has them; ``None``: stock vLLM.
    """
    from .host import Host

    prompts = [[8] * (num_tokens - BLOCK_SIZE + i % BLOCK_SIZE) for i in range(num_reqs)]
    # The first to be read decode on while the last are read.
    num_reading = num_reqs * (num_tokens // TOKENS_PER_STEP + 2)
    # No layer runs: so many that all numbers of groups divide them.
    num_layers = math.lcm(*(of.get(LAYER_GROUPS, 1) for of in policies.values() if of))
    sides = {}
    for name, policy in policies.items():
        sides[name] = Host(
            model,
            policy,
            num_reqs,
            num_tokens + num_reading + (1 + rounds) * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=TOKENS_PER_STEP,
            skip_tokenizer_init=True,
            hf_overrides={
                "max_position_embeddings": 2 * max(CONTEXTS),
                "num_hidden_layers": num_layers,
            },
        )
        sides[name].start(prompts)
    gc.collect()
    gc.freeze()  # as vLLM does once an engine has started
    seconds: dict[str, list[Any]] = {name: [] for name in sides}
    for side in sides.values():
        side.steps(BLOCK_SIZE)
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.steps(BLOCK_SIZE))
    gc.unfreeze()
    microseconds = {
        name: {
            part: 1e6 * statistics.median(getattr(of, part) for of in measured)
            for part in ("scheduler", "worker")
        }
        for name, measured in seconds.items()
    }
    added = {
        name: statistics.median(
            1e6 * (sum(ours) - sum(stock))
            for ours, stock in zip(measured, seconds["stock"], strict=True)
        )
        for name, measured in seconds.items()
        if name != "stock"
    }
    return {
        "num_reqs": num_reqs,
        "num_tokens": num_tokens,
        "microseconds": microseconds,
        "added_microseconds": added,
        "scheduler_ratio": {
            name: statistics.median(
                ours.scheduler / stock.scheduler
                for ours, stock in zip(measured, seconds["stock"], strict=True)
            )
            for name, measured in seconds.items()
            if name != "stock"
        },
        "evicted_blocks": sides["semantic"].evicted_blocks(),
    }


def growth(cells: list[dict[str, Any]]) -> dict[str, float]:
    """By batch size: what the policy adds at the longest context over the shortest."""
    added: dict[int, list[float]] = {}
    for cell in cells:
        added.setdefault(cell["num_reqs"], []).append(cell["added_microseconds"]["semantic"])
    return {str(num_reqs): values[-1] / values[0] for num_reqs, values in added.items()}


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="Microseconds a step on the host")
    head = ("requests", "context", "scheduler", "semantic", "over stock", "ample over stock")
    for name in head:
        table.add_column(name, justify="right")
    others = [name for name in report["context"]["sides"] if name not in ("stock", "semantic")]
    for name in ("added in all", *(f"added, {name.removeprefix('semantic, ')}" for name in others)):
        table.add_column(name, justify="right")
    for cell in report["cells"]:
        times, added = cell["microseconds"], cell["added_microseconds"]
        table.add_row(
            str(cell["num_reqs"]),
            str(cell["num_tokens"]),
            f"{times['stock']['scheduler']:.0f}",
            f"{times['semantic']['scheduler']:.0f}",
            f"{cell['scheduler_ratio']['semantic']:.3f}",
            f"{cell['scheduler_ratio']['ample']:.3f}",
            f"{added['semantic']:.0f}",
            *(f"{added[name]:.0f}" if name in added else "" for name in others),
        )
    return table
