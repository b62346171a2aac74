"""One GPU, one command, under nine minutes: correctness first, then stock vLLM beside the policy.

Weights are random: speed does not depend on what they say. vLLM's defaults otherwise: its
choice of runner, asynchronous scheduling, torch.compile, CUDA graphs.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from . import shapes
from .context import MODEL, RESULTS, context
from .engines import RemoteEngine, engine
from .figures import alternate, random_tokens, ratio, tokens_per_second

MAIN_MODEL = "llama-3.1-8b"
"""The model whose figures stand at the top of the file."""

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"load_format": "dummy"},
    "nf4": {"quantization": "bitsandbytes"},
}

START_SECONDS = 150
"""What two engines of the largest model may take to start: with less left, none is."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    batch: int = 256
    batch_context: int = 2048
    kv_context: int = 32768
    kv_requests: int = 64
    kv_pool_requests: int = 4
    """Requests of ``kv_context`` tokens that stock vLLM's KV pool holds."""
    num_steps: int = 96
    num_short: tuple[int, int] = (64, 160)
    """Prompt and new tokens of a request that the budget holds."""

    def pool_tokens(self) -> int:
        """What a KV pool has to hold for every task; both sides get as much."""
        return max(
            self.max_model_len(),
            (self.kv_context + 512) * self.kv_pool_requests,  # a block or two more for each
            self.batch * (BUDGET + self.num_steps),
        )

    def max_model_len(self) -> int:
        return max(self.contexts) + self.num_steps + 64


BUDGET = 272
"""Tokens that the semantic policy keeps with its defaults and blocks of 16."""

SIZES = {
    "llama-3.1-8b": Sizes(),
    # Twice and a half the KV cache of the larger model for each token: smaller all over.
    "pythia-2.8b": Sizes(contexts=(1024, 8192, 32768), batch=128, kv_context=8192),
}
QUICK = Sizes(
    contexts=(512, 1024),
    batch=8,
    batch_context=512,
    kv_context=1024,
    kv_requests=4,
    kv_pool_requests=2,
    num_steps=40,
)
"""To see that the benchmark runs, on any machine."""


@dataclass
class Run:
    """One invocation: what it may take, and what it found."""

    deadline: float
    console: Console = field(default_factory=Console)
    skipped: list[str] = field(default_factory=list)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def run(
    models: list[str],
    kinds: list[str],
    out: Path = RESULTS / "figures-gpu.json",
    seconds: float = 520,
    quick: bool = False,
) -> None:
    """Check, then measure each model and kind until the time is up.

    Results of other models and kinds in the file stay, so that several calls may share the
    work. What there was no time for is named under ``skipped``.
    """
    this = Run(time.monotonic() + seconds)
    report: Results = json.loads(out.read_text()) if out.exists() else {"details": {}}
    report["context"] = context(", ".join(models), kinds=kinds, quick=quick)
    report["correctness"] = check(this)
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            for kind in kinds:
                if this.seconds_left() < START_SECONDS:
                    this.skipped.append(f"{model} {kind}")
                    continue
                this.console.print(f"[bold]{model} {kind}[/]")
                path = Path(folder) / f"{model}-{kind}"
                path.mkdir()
                write = shapes.write_config if kind == "bf16" else shapes.write_checkpoint
                sizes = QUICK if quick else SIZES.get(model, QUICK)
                found = measure(write(model, path), kind, sizes, this)
                report["details"].setdefault(model, {})[kind] = {
                    "date": report["context"]["date"],
                    "device": report["context"]["machine"]["device"],
                    **found,
                }
                if model == models[0] and (model == MAIN_MODEL or quick):
                    figures = found["figures"].items()
                    report |= {f"{key}_{kind}": value for key, value in figures}
                report["skipped"] = this.skipped
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1) + "\n")
    for key, value in report.items():
        if isinstance(value, float):
            this.console.print(f"{key:<48}{value:10.4f}")


# -- correctness -----------------------------------------------------------------------


def check(this: Run) -> Results:
    """Greedy tokens: stock vLLM's where nothing is evicted; else that eviction fired.

    The bundled model has real weights; its tokens say more than those of random ones.
    """
    prompts = random_tokens(6, 300) + random_tokens(2, 900)
    kwargs = {"dtype": "bfloat16", "max_model_len": 2048, "gpu_memory_utilization": 0.2}
    with (
        engine(str(MODEL), block_size=32, **kwargs) as stock,
        engine(str(MODEL), "semantic", {"semantic_tokens": 1536}, **kwargs) as ample,
        engine(str(MODEL), "semantic", **kwargs) as tight,
    ):
        expected = stock.tokens(prompts, 128)
        same = [a == b for a, b in zip(expected, ample.tokens(prompts, 128), strict=True)]
        together = tight.tokens(prompts, 128)
        alone = [tight.tokens([prompt], 128)[0] for prompt in prompts]
        results = {
            "runner": tight.runner(),
            "ample_budget_equals_stock": sum(same) / len(same),
            "same_in_a_batch_as_alone": sum(a == b for a, b in zip(together, alone, strict=True))
            / len(prompts),
            "evicted_blocks": tight.stats()["evicted_blocks"],
        }
    assert results["evicted_blocks"] > 0, "nothing was evicted"
    this.console.print(results)
    return results


# -- speed -----------------------------------------------------------------------------


def measure(model: str, kind: str, sizes: Sizes, this: Run) -> Results:
    """All tasks for one model and kind, with both engines on the GPU at once."""
    found: Results = {"figures": {}}
    graph_sizes = [1 << i for i in range(sizes.batch.bit_length())]
    kwargs: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": sizes.max_model_len(),
        "skip_tokenizer_init": True,
        "max_num_seqs": sizes.batch,
        "kv_cache_memory_bytes": kv_bytes(model, sizes.pool_tokens()),
        "gpu_memory_utilization": 0.4,  # of what must be free at start; two engines share
        "compilation_config": {"cudagraph_capture_sizes": graph_sizes},
        **KINDS[kind],
    }
    with (
        engine(model, **kwargs) as stock,
        engine(model, "semantic", **kwargs) as semantic,
    ):
        sides = {"stock": stock, "semantic": semantic}
        found["runner"] = {name: side.runner() for name, side in sides.items()}
        for task in (no_eviction, decode_latency, overhead, attention, kv_bound):
            if this.seconds_left() < 30:
                this.skipped.append(f"{Path(model).name} {task.__name__}")
                continue
            began = time.monotonic()
            figures, detail = task(sides, sizes)
            found["figures"] |= figures
            found[task.__name__] = detail | {"took_seconds": time.monotonic() - began}
            this.console.print(task.__name__, figures, detail)
        found["memory"] = {name: side.memory() for name, side in sides.items()}
    return found


def no_eviction(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Throughput of requests that the budget holds, over stock's."""
    num_prompt, num_new = sizes.num_short
    prompts = random_tokens(sizes.batch, num_prompt)
    speeds = alternate(sides, 3, lambda side: tokens_per_second(side, prompts, num_new))
    return {"no_eviction_throughput_ratio": ratio(speeds, "semantic", "stock")}, speeds


def decode_latency(
    sides: dict[str, RemoteEngine], sizes: Sizes
) -> tuple[dict[str, float], Results]:
    """Seconds of a decode step of one request at each context."""
    times: dict[str, dict[int, float]] = {name: {} for name in sides}
    for length in sizes.contexts:
        prompt = random_tokens(1, length)
        for name, side in sides.items():
            times[name][length] = side.decode_steps(prompt, sizes.num_steps)["seconds"]
    first, last = sizes.contexts[0], sizes.contexts[-1]
    flatness = {name: of[last] / of[first] for name, of in times.items()}
    name = f"decode_flatness_{last // 1024}k_over_{first // 1024}k"
    return {name: flatness["semantic"], f"{name}_stock": flatness["stock"]}, {"seconds": times}


def overhead(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """What a step costs beyond stock's where both read the same number of keys.

    The policy decodes far over its budget; stock decodes around a context as long as the
    budget. The rest is scoring, compaction, transport and the scheduler's part of them.
    """
    near = random_tokens(sizes.batch, BUDGET - sizes.num_steps // 2)
    far = random_tokens(sizes.batch, sizes.batch_context)
    seconds: dict[str, list[float]] = {"stock": [], "semantic": []}
    for _ in range(2):
        for name, prompts in (("stock", near), ("semantic", far)):
            seconds[name].append(sides[name].decode_steps(prompts, sizes.num_steps)["seconds"])
    share = 1 - min(seconds["stock"]) / min(seconds["semantic"])
    return {"scoring_share_of_step": share}, {"seconds": seconds}


def attention(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Attention of a full batch over the time to read the kept keys and values once."""
    prompts = random_tokens(sizes.batch, sizes.batch_context)
    semantic = sides["semantic"]
    bandwidth = semantic.bandwidth()
    measured = semantic.attention(prompts)
    memory = semantic.memory()
    least = measured["kept_kv_bytes"] / bandwidth
    return {"attention_over_roofline": measured["seconds"] / least}, {
        "attention_seconds": measured["seconds"],
        "kept_kv_bytes": measured["kept_kv_bytes"],
        "bandwidth_bytes_per_second": bandwidth,
        "roofline_step_seconds": least + memory["weights"] / bandwidth,
    }


def kv_bound(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Decode throughput at long contexts with as many requests as each pool admits.

    The prompts have been read; both pools are of one size. Stock runs what fits, the policy
    what was offered.
    """
    speeds = {}
    for name, num_requests in (
        ("stock", sizes.kv_pool_requests),
        ("semantic", sizes.kv_requests),
    ):
        prompts = random_tokens(num_requests, sizes.kv_context - sizes.num_steps)
        seconds = sides[name].decode_steps(prompts, sizes.num_steps)["seconds"]
        speeds[name] = num_requests / seconds
    evicted = sides["semantic"].stats()["evicted_blocks"]
    assert evicted > 0, "nothing was evicted: the figure would say nothing"
    name = f"kv_bound_throughput_ratio_{sizes.kv_context // 1024}k"
    return {name: speeds["semantic"] / speeds["stock"]}, {
        "tokens_per_second": speeds,
        "requests": {"stock": sizes.kv_pool_requests, "semantic": sizes.kv_requests},
        "evicted_blocks": evicted,
    }


def kv_bytes(model: str, num_tokens: int) -> int:
    """Bytes of keys and values of ``num_tokens`` tokens in bf16."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = config.hidden_size // config.num_attention_heads
    return num_tokens * config.num_hidden_layers * num_kv_heads * head_size * 2 * 2
