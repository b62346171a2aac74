"""One GPU, one command, under nine minutes: correctness first, then stock vLLM beside the policy.

Weights are random: speed does not depend on what they say. vLLM's defaults otherwise: its
choice of runner, asynchronous scheduling, torch.compile, CUDA graphs.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from . import shapes, texts
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
    policies: list[str],
    out: Path = RESULTS / "figures-gpu.json",
    seconds: float = 520,
    quick: bool = False,
) -> None:
    """Check, then measure each model, kind and policy until the time is up.

    Results of others in the file stay, so that several calls may share the
    work. What there was no time for is named under ``skipped``. A quick run keeps nothing: its
    sizes say nothing about speed.
    """
    os.environ.setdefault("VLLM_GPU_SYNC_CHECK", "error")  # no step waits for the device
    this = Run(time.monotonic() + seconds)
    report: Results = json.loads(out.read_text()) if out.exists() else {"details": {}}
    report["context"] = context(", ".join(models), kinds=kinds, quick=quick)
    report["correctness"] = check(this)
    report["skipped"] = this.skipped
    with tempfile.TemporaryDirectory() as folder:
        for model, kind, policy in itertools.product(models, kinds, policies):
            if this.seconds_left() < START_SECONDS:
                this.skipped.append(f"{model} {kind} {policy}")
                continue
            this.console.print(f"[bold]{model} {kind} {policy}[/]")
            path = Path(folder) / f"{model}-{kind}"
            if not path.exists():
                write = shapes.write_config if kind == "bf16" else shapes.write_checkpoint
                write(model, path)
            sizes = QUICK if quick else SIZES.get(model, QUICK)
            found = measure(str(path), kind, policy, sizes, this)
            found |= {name: report["context"][name] for name in ("date", "machine")}
            report["details"].setdefault(model, {}).setdefault(kind, {})[policy] = found
            if policy == "semantic" and (quick or model == MAIN_MODEL):
                report |= {f"{key}_{kind}": value for key, value in found["figures"].items()}
            _keep(report, out, quick)
    _keep(report, out, quick)
    for key, value in report.items():
        if isinstance(value, float):
            this.console.print(f"{key:<48}{value:10.4f}")


def _keep(report: Results, out: Path, quick: bool) -> None:
    if not quick:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


# -- correctness -----------------------------------------------------------------------


def check(this: Run) -> Results:
    """Kernels against their references, likelihoods against the oracle, tokens against stock.

    The bundled model has real weights; what it says means more than what random ones say.
    """
    prompts = random_tokens(6, 300) + random_tokens(2, 900)
    kwargs: dict[str, Any] = {"max_model_len": 2048, "gpu_memory_utilization": 0.2}
    half = kwargs | {"dtype": "bfloat16", "block_size": 32}
    with (
        engine(str(MODEL), **half) as stock,
        engine(str(MODEL), "semantic", {"semantic_tokens": 1536}, **half) as ample,
        engine(str(MODEL), "semantic", **half) as tight,
    ):
        expected = stock.tokens(prompts, 128)
        results = {
            "runner": tight.runner(),
            "kernel_differences": tight.kernels(),
            "ample_budget_equals_stock": share_equal(expected, ample.tokens(prompts, 128)),
            "batch_equals_alone": share_equal(
                tight.tokens(prompts, 128), [tight.tokens([prompt], 128)[0] for prompt in prompts]
            ),
            "evicted_blocks": tight.stats()["evicted_blocks"],
        }
    assert results["evicted_blocks"] > 0, "nothing was evicted"
    with engine(
        str(MODEL), "semantic", **kwargs, dtype="float32", max_num_batched_tokens=512
    ) as side:
        results["oracle"] = against_oracle(side)
    this.console.print(results)
    return results


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of all texts, how many are the same to the last token; batches round differently."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def against_oracle(side: RemoteEngine) -> Results:
    """Log-likelihoods of real text in float32, over budget, against transformers'."""
    from tests.oracle import Case, judge

    documents = texts.documents("pg19", str(MODEL), 700)[:2]
    settings = side.settings()
    nll = side.nll(documents, 400)["nll"]
    cases = [
        Case(
            str(MODEL),
            document,
            num_prompt_tokens=400,
            block_size=settings["block_size"],
            prefill_interval=512,
            sink_tokens=8,
            recent_tokens=64,
            semantic_tokens=192,
            eviction_delay=int(settings["async_scheduling"]),
        )
        for document in documents
    ]
    differences = [
        abs(-loss - logprob)
        for losses, verdict in zip(nll, judge(cases), strict=True)
        for loss, logprob in zip(losses, verdict.logprobs, strict=True)
    ]
    assert side.stats()["evicted_blocks"] > 0, "nothing was evicted"
    return {
        "mean_difference": sum(differences) / len(differences),
        "largest_difference": max(differences),
    }


# -- speed -----------------------------------------------------------------------------


def measure(model: str, kind: str, policy: str, sizes: Sizes, this: Run) -> Results:
    """All tasks for one model, kind and policy, with both engines on the GPU at once."""
    found: Results = {"figures": {}}
    graph_sizes = [1 << i for i in range(sizes.batch.bit_length())]
    kwargs: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": sizes.max_model_len(),
        "skip_tokenizer_init": True,
        "max_num_seqs": sizes.batch,
        "kv_cache_memory_bytes": shapes.kv_bytes(model, sizes.pool_tokens()),
        "gpu_memory_utilization": 0.4,  # of what must be free at start; two engines share
        "compilation_config": {"cudagraph_capture_sizes": graph_sizes},
        **KINDS[kind],
    }
    with (
        engine(model, **kwargs) as stock,
        engine(model, policy, **kwargs) as bounded,
    ):
        sides = {"stock": stock, "policy": bounded}
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
        found["memory"] = {name: side.memory() | side.stats() for name, side in sides.items()}
    return found


def no_eviction(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Throughput of requests that the budget holds, over stock's."""
    num_prompt, num_new = sizes.num_short
    prompts = random_tokens(sizes.batch, num_prompt)
    speeds = alternate(sides, 3, lambda side: tokens_per_second(side, prompts, num_new))
    return {"no_eviction_throughput_ratio": ratio(speeds, "policy", "stock")}, speeds


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
    return {name: flatness["policy"], f"{name}_stock": flatness["stock"]}, {"seconds": times}


def overhead(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """What a step costs beyond stock's where both read the same number of keys.

    The policy decodes far over its budget; stock decodes around a context as long as the
    budget. The rest is scoring, compaction, transport and the scheduler's part of them.
    """
    near = random_tokens(sizes.batch, BUDGET - sizes.num_steps // 2)
    far = random_tokens(sizes.batch, sizes.batch_context)
    seconds: dict[str, list[float]] = {"stock": [], "policy": []}
    for _ in range(2):
        for name, prompts in (("stock", near), ("policy", far)):
            seconds[name].append(sides[name].decode_steps(prompts, sizes.num_steps)["seconds"])
    share = 1 - min(seconds["stock"]) / min(seconds["policy"])
    return {"scoring_share_of_step": share}, {"seconds": seconds}


def attention(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Attention of a full batch over the time to read the kept keys and values once."""
    prompts = random_tokens(sizes.batch, sizes.batch_context)
    semantic = sides["policy"]
    bandwidth = semantic.bandwidth()
    measured = semantic.attention(prompts)
    least = measured["kept_kv_bytes"] / bandwidth
    return {"attention_over_roofline": measured["seconds"] / least}, {
        "attention_seconds": measured["seconds"],
        "kept_kv_bytes": measured["kept_kv_bytes"],
        "bandwidth_bytes_per_second": bandwidth,
        "roofline_step_seconds": least + semantic.stats()["weight_bytes"] / bandwidth,
    }


def kv_bound(sides: dict[str, RemoteEngine], sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Decode throughput at long contexts with as many requests as each pool admits.

    The prompts have been read; both pools are of one size. Stock runs what fits, the policy
    what was offered.
    """
    speeds = {}
    for name, num_requests in (
        ("stock", sizes.kv_pool_requests),
        ("policy", sizes.kv_requests),
    ):
        prompts = random_tokens(num_requests, sizes.kv_context - sizes.num_steps)
        seconds = sides[name].decode_steps(prompts, sizes.num_steps)["seconds"]
        speeds[name] = num_requests / seconds
    evicted = sides["policy"].stats()["evicted_blocks"]
    assert evicted > 0, "nothing was evicted: the figure would say nothing"
    name = f"kv_bound_throughput_ratio_{sizes.kv_context // 1024}k"
    return {name: speeds["policy"] / speeds["stock"]}, {
        "tokens_per_second": speeds,
        "requests": {"stock": sizes.kv_pool_requests, "policy": sizes.kv_requests},
        "evicted_blocks": evicted,
    }
