"""A given KV memory: how many requests it holds, and what they decode, stock against policies."""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .context import MODEL, RESULTS, context
from .engines import RemoteEngine, engine
from .figures import BASE, BLOCK_SIZE, random_tokens

CONTEXTS = (1024, 4096, 16384, 32768)
SIDES: dict[str, str | None] = {"stock": None, "streaming": "streaming", "semantic": "semantic"}
TOKENS_PER_STEP = 2048
KV_BYTES = 112 << 20
"""A little more than one request of the longest context needs."""
MAX_NUM_SEQS = 128


def run(
    model: str = str(MODEL),
    contexts: tuple[int, ...] = CONTEXTS,
    rounds: int = 3,
    max_prompt_tokens: int = 1 << 17,
    out: Path = RESULTS / "capacity.json",
) -> dict[str, Any]:
    """Measure contexts afresh; the others in the file stay as they are.

    Args:
        model: the shape; weights are random.
        contexts: tokens of each request at the end.
        rounds: of a block's worth of decode steps each.
        max_prompt_tokens: of all requests together: what reading prompts may take. A side that
            holds more requests than that is measured with fewer.
        out: written after each context.
    """
    console = Console()
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    report["context"] = context(
        model,
        rounds=rounds,
        block_size=BLOCK_SIZE,
        dtype="bfloat16",
        kv_bytes=KV_BYTES,
        max_num_seqs=MAX_NUM_SEQS,
        max_prompt_tokens=max_prompt_tokens,
    )
    kwargs = BASE | {
        "max_model_len": max(contexts) + BLOCK_SIZE * 64,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": TOKENS_PER_STEP,
        "kv_cache_memory_bytes": KV_BYTES,
        "hf_overrides": {"max_position_embeddings": 2 * max(contexts)},
    }
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(engine(model, policy, **kwargs))
            for name, policy in SIDES.items()
        }
        for num_tokens in contexts:
            row = _measure(sides, num_tokens, rounds, max_prompt_tokens)
            row["date"] = report["context"]["date"]
            report["rows"][str(num_tokens)] = row
            console.print(num_tokens, row["tokens_per_second"])
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(_table(report))
    return report


def _measure(
    sides: dict[str, RemoteEngine], num_tokens: int, rounds: int, max_prompt_tokens: int
) -> dict[str, Any]:
    """Each side with as many requests as it holds, all of them decoding, in turns."""
    num_steps = (1 + rounds) * BLOCK_SIZE
    most = max(1, max_prompt_tokens // num_tokens)
    fits = {name: side.fits(num_tokens) for name, side in sides.items()}
    served = {name: min(count, most, MAX_NUM_SEQS) for name, count in fits.items()}
    for name, side in sides.items():
        # The first to be read decode on while the last are read.
        num_reading = served[name] * num_tokens // TOKENS_PER_STEP + 8
        prompts = random_tokens(served[name], num_tokens - num_steps - num_reading)
        side.start_decoding(prompts, num_steps)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(1 + rounds):
        for name, side in sides.items():
            speed = served[name] * BLOCK_SIZE / side.decode(BLOCK_SIZE)
            if i:  # the first only warms up
                speeds[name].append(speed)
    for side in sides.values():
        side.stop_decoding()
    over_stock = {
        name: statistics.median(
            ours / stock for ours, stock in zip(speeds[name], speeds["stock"], strict=True)
        )
        for name in sides
    }
    return {
        "fits": fits,
        "served": served,
        "tokens_per_second": {name: statistics.median(of) for name, of in speeds.items()},
        "over_stock": over_stock,
        "rounds": speeds,
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['context']['kv_bytes'] >> 20} MiB of KV cache")
    table.add_column("context", justify="right")
    for what in ("fit", "tok/s"):
        for name in SIDES:
            table.add_column(f"{what} {name}", justify="right")
    table.add_column("semantic over stock", justify="right")
    for num_tokens, row in report["rows"].items():
        table.add_row(
            num_tokens,
            *(str(row["fits"][name]) for name in SIDES),
            *(f"{row['tokens_per_second'][name]:.0f}" for name in SIDES),
            f"{row['over_stock']['semantic']:.2f}",
        )
    return table
