"""One GPU, one command, six minutes: correctness in small engines, then stock beside the policy.

Weights are random: speed does not depend on what they say. vLLM's defaults otherwise: its
choice of runner, asynchronous scheduling, torch.compile, CUDA graphs. Every time is taken from
an idle device to an idle device, and every step that is timed decodes one token of every request.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from . import checks, shapes
from .context import RESULTS, context, now, on_gpu
from .engines import RemoteEngine, starting
from .figures import alternate, random_tokens, ratio, tokens_per_second
from .kernel_times import added, attention_seconds, total_seconds

MAIN_MODEL = "llama-3.1-8b"
"""The model whose figures stand at the top of the file."""

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"load_format": "dummy"},
    "nf4": {"quantization": "bitsandbytes"},
}

SECONDS = 360
"""For everything at one model."""

Results = dict[str, Any]
Sides = dict[str, RemoteEngine]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    batch: int = 256
    batch_context: int = 1024
    kv_context: int = 32768
    kv_requests: int = 64
    kv_pool_requests: int = 4
    """Requests of ``kv_context`` tokens that stock vLLM's KV pool holds."""
    num_steps: int = 32
    """Of a round: whole blocks, so that every request evicts as often."""
    rounds: int = 3
    short: tuple[int, int] = (64, 160)
    """Prompt and new tokens of a request that the budget holds."""
    serving: tuple[int, int, int] = (96, 4096, 512)
    """Requests, and prompt and new tokens of each: more than the pool holds at once."""
    bandwidth_bytes: int = 2 << 30
    patience: float = 1.0
    """How long tasks may take, over what is noted for the sizes here."""

    def steps(self) -> int:
        """Of a task that decodes in turns: a round to warm up, rounds, a profile, and its end."""
        return (self.rounds + 3) * self.num_steps

    def pool_tokens(self) -> int:
        """What a KV pool has to hold for every task; both sides get as much."""
        return max(
            self.max_model_len(),
            (self.kv_context + 512) * self.kv_pool_requests,  # a block or two more for each
            self.batch * (MOST_BUDGET + self.steps()),
        )

    def max_model_len(self) -> int:
        return max(self.contexts) + self.steps() + 64


MOST_BUDGET = 288
"""Tokens that the semantic policy keeps with its defaults and blocks of 32; 272 with 16."""

SIZES = {
    "llama-3.1-8b": Sizes(),
    # Twice and a half the KV cache of the larger model for each token: smaller all over.
    "pythia-2.8b": Sizes(
        contexts=(1024, 8192, 32768), batch=128, kv_context=8192, serving=(48, 4096, 512)
    ),
}
QUICK = Sizes(
    contexts=(512, 1024),
    batch=4,
    batch_context=512,
    kv_context=1024,
    kv_requests=4,
    kv_pool_requests=2,
    rounds=2,
    short=(32, 48),
    serving=(4, 512, 32),
    bandwidth_bytes=64 << 20,
    patience=0.0,
)
"""To see that the benchmark runs, on any machine."""


class Report:
    """What one invocation found, in the file after each task, beside what others left there.

    Args:
        out: the file; ``None``: nowhere.
        seconds: when the time is up.
    """

    def __init__(self, out: Path | None, seconds: float) -> None:
        self.out = out
        self.content: Results = json.loads(out.read_text()) if out and out.exists() else {}
        self.console = Console()
        self._deadline = time.monotonic() + seconds
        self._lock = threading.Lock()

    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def put(self, *path: str, **found: Any) -> None:
        """Add to what is under ``path`` and write everything."""
        with self._lock:
            place = self.content
            for name in path:
                place = place.setdefault(name, {})
            place |= found
            if self.out is not None:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self.out.write_text(json.dumps(self.content, indent=1) + "\n")

    def drop(self, *path: str) -> None:
        """Forget what is under ``path``, if anything is."""
        with self._lock:
            place = self.content
            for name in path[:-1]:
                place = place.get(name, {})
            place.pop(path[-1], None)

    def fail(self, place: tuple[str, ...], name: str, error: Exception) -> None:
        """Note the last words of an error: a traceback ends with what it is."""
        words = f"{type(error).__name__}: {error}"[-2000:]
        self.put(*place, "failed", **{name: words})
        self.say(f"{name}: failed,", words)

    def say(self, *words: Any) -> None:
        self.console.print(*words)


def run(
    models: Sequence[str] = (MAIN_MODEL,),
    kinds: Sequence[str] = ("bf16",),
    policies: Sequence[str] = ("semantic",),
    out: Path | None = RESULTS / "figures-gpu.json",
    seconds: float = SECONDS,
    quick: bool = False,
    only: Sequence[str] = (),
) -> Results:
    """Check while the first engines start, then measure until the time is up.

    Args:
        models: names of shapes.
        kinds: how weights are held, of :data:`KINDS`.
        policies: each beside stock vLLM.
        out: written after each task; results of other tasks in it stay. ``None``: nowhere.
        seconds: a task that would not end by then is skipped, and named with the reason.
        quick: tiny sizes; they say nothing about speed.
        only: names of tasks and checks; all by default.

    Returns:
        The report.

    Raises:
        ValueError: a name in ``only`` is not known.
    """
    known = [*checks.names(on_gpu()), *TASKS]
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only {', '.join(unknown)} is not known; allowed: {', '.join(known)}")
    report = Report(out, seconds)
    report.put("context", **context(", ".join(models), kinds=list(kinds), quick=quick))
    tasks = [name for name in TASKS if not only or name in only]
    wanted = [name for name in checks.names(on_gpu()) if not only or name in only]
    prepared = checks.prepare(wanted, on_gpu())
    with tempfile.TemporaryDirectory() as folder, _checking(prepared, report) as checked:
        for model, kind, policy in itertools.product(models if tasks else (), kinds, policies):
            path = Path(folder) / f"{model}-{kind}"
            if not path.exists():
                write = shapes.write_config if kind == "bf16" else shapes.write_checkpoint
                write(model, path)
            sizes = QUICK if quick else SIZES.get(model, QUICK)
            place = ("details", model, kind, policy)
            _measure(path, kind, policy, sizes, tasks, place, report, checked)
            if policy == "semantic" and (quick or model == MAIN_MODEL):
                figures = report.content["details"][model][kind][policy].get("figures", {})
                report.put(**{f"{key}_{kind}": value for key, value in figures.items()})
    return report.content


@contextmanager
def _checking(prepared: Mapping[str, checks.Check], report: Report) -> Iterator[threading.Thread]:
    """The checks, beside the engines that start meanwhile; nothing is timed before they end."""

    def check() -> None:
        for name, found in checks.run(prepared, on_gpu()):
            report.put("correctness", **{name: {"date": now(), **found}})
            report.say(f"check {name}:", found.get("error", "passed"))

    thread = threading.Thread(target=check)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def _measure(
    model: Path,
    kind: str,
    policy: str,
    sizes: Sizes,
    tasks: Sequence[str],
    place: tuple[str, ...],
    report: Report,
    checked: threading.Thread,
) -> None:
    """Tasks for one model, kind and policy, with both engines on the GPU at once."""
    kwargs: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": sizes.max_model_len(),
        "skip_tokenizer_init": True,
        "max_num_seqs": sizes.batch,
        "kv_cache_memory_bytes": shapes.kv_bytes(str(model), sizes.pool_tokens()),
        "gpu_memory_utilization": 0.3,  # of what must be free at start; several engines share
        "enforce_eager": not on_gpu(),  # for a CPU, compiling takes longer than all this
        "forcing": False,
        "seconds": report.seconds_left() + 60,
        **KINDS[kind],
    }
    if on_gpu():
        graph_sizes = [1 << i for i in range(sizes.batch.bit_length())]
        kwargs["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes}
    began = time.monotonic()
    with (
        starting(str(model), **kwargs) as stock,
        starting(str(model), policy, **kwargs) as bounded,
    ):
        sides = {"stock": stock, "policy": bounded}
        report.drop(*place, "failed", "start")
        try:
            chosen = {name: side.chosen() for name, side in sides.items()}
        except Exception as error:  # whatever it was, it is the result
            report.fail(place, "start", error)
            return
        report.put(*place, engines=chosen, start_seconds=time.monotonic() - began)
        report.say(place, chosen)
        checked.join()
        for name in tasks:
            _run_task(name, sides, sizes, place, report)


def _run_task(
    name: str, sides: Sides, sizes: Sizes, place: tuple[str, ...], report: Report
) -> None:
    """One task: its figures and details, or why there are none."""
    task, expected = TASKS[name][0], TASKS[name][1] * sizes.patience
    for state in ("skipped", "failed"):
        report.drop(*place, state, name)
    if report.seconds_left() < expected:
        why = f"{report.seconds_left():.0f} s were left, it may take {expected:.0f} s"
        report.put(*place, "skipped", **{name: why})
        report.say(f"{name}: skipped, {why}")
        return
    began = time.monotonic()
    try:
        for side in sides.values():
            side.stop_decoding()  # what a task left that failed
        figures, detail = task(sides, sizes)
    except Exception as error:  # whatever it was, it is the result; others may still have one
        report.fail(place, name, error)
        return
    detail |= {"date": now(), "took_seconds": time.monotonic() - began}
    report.put(*place, "tasks", **{name: detail})
    report.put(*place, "figures", **figures)
    report.say(f"{name}: {detail['took_seconds']:.0f} s", figures)


# -- tasks -----------------------------------------------------------------------------


def idle(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """A budget that is never reached: whole runs, and steps in which all requests decode."""
    evicted = sides["policy"].stats()["evicted_blocks"]
    num_prompt, num_new = sizes.short
    prompts = random_tokens(sizes.batch, num_prompt)
    speeds = alternate(sides, sizes.rounds, lambda side: tokens_per_second(side, prompts, num_new))
    steps = _decode_in_turns(sides, dict.fromkeys(sides, prompts), sizes)
    assert sides["policy"].stats()["evicted_blocks"] == evicted, "the budget was reached"
    return {
        "no_eviction_throughput_ratio": ratio(speeds, "policy", "stock"),
        "idle_step_ratio": steps["step_ratio"],
        "idle_kernel_share": steps["kernel_share"],
    }, {"tokens_per_second": speeds, **steps}


def over_budget(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """What a step costs beyond stock's where both read the same number of keys.

    The policy decodes far over its budget; stock decodes around a context as long as what the
    policy keeps on average: the budget and half of the block that is being filled.
    """
    settings = sides["policy"].settings()
    kept = settings["budget_tokens"] + settings["block_size"] // 2
    # Before the middle of the rounds lies the one that warms up.
    num_near = kept - round((1 + sizes.rounds / 2) * sizes.num_steps)
    prompts = {
        "stock": random_tokens(sizes.batch, num_near),
        "policy": random_tokens(sizes.batch, sizes.batch_context),
    }
    steps = _decode_in_turns(sides, prompts, sizes, stop=False)
    held = {name: side.kept_kv() for name, side in sides.items()}
    check_kept(held["policy"], settings)
    middle = held["stock"]["tokens"] - (1 + sizes.rounds / 2) * sizes.num_steps
    assert abs(middle - kept) < settings["block_size"], f"stock was at {middle}, not {kept}"
    read = sides["policy"].read_kv_bytes()
    per_token = held["policy"]["kv_bytes"] / held["policy"]["tokens"] / sizes.batch
    # The tables that the scheduler keeps and the lengths that the kernels are given, some steps on.
    assert (
        abs(read - held["policy"]["kv_bytes"]) <= settings["block_size"] * sizes.batch * per_token
    )
    for side in sides.values():
        side.stop_decoding()
    bandwidth = sides["policy"].bandwidth(sizes.bandwidth_bytes)
    return {
        "over_budget_step_ratio": steps["step_ratio"],
        "over_budget_kernel_share": steps["kernel_share"],
        "attention_over_roofline": steps["attention_seconds"]["policy"] / (read / bandwidth),
    }, {
        **steps,
        "kept": held,
        "read_kv_bytes": read,
        "bandwidth_bytes_per_second": bandwidth,
        "evicted_blocks": sides["policy"].stats()["evicted_blocks"],
    }


def latency(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """One request at each context: its first token, and its decode steps."""
    num_steps = sizes.rounds * sizes.num_steps
    found: dict[str, dict[int, Results]] = {name: {} for name in sides}
    for length in sizes.contexts:
        for name, side in sides.items():
            found[name][length] = _decode(side, random_tokens(1, length), num_steps)
    first, last = sizes.contexts[0], sizes.contexts[-1]
    flatness = {name: of[last]["seconds"] / of[first]["seconds"] for name, of in found.items()}
    first_tokens = {name: of[last]["first_tokens"] for name, of in found.items()}
    name = f"decode_flatness_{_thousands(last)}_over_{_thousands(first)}"
    return {
        f"ttft_ratio_{_thousands(last)}": first_tokens["policy"] / first_tokens["stock"],
        name: flatness["policy"],
        f"{name}_stock": flatness["stock"],
    }, found


def long_requests(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Decode throughput at long contexts with as many requests as each pool admits.

    The prompts have been read; both pools are of one size. Stock runs what fits, the policy
    what was offered.
    """
    num_steps = sizes.rounds * sizes.num_steps
    counts = {"stock": sizes.kv_pool_requests, "policy": sizes.kv_requests}
    found, speeds = {}, {}
    for name, side in sides.items():
        prompts = random_tokens(counts[name], sizes.kv_context - num_steps)
        found[name] = _decode(side, prompts, num_steps)
        speeds[name] = counts[name] / found[name]["seconds"]
    name = f"kv_bound_throughput_ratio_{_thousands(sizes.kv_context)}"
    return {name: speeds["policy"] / speeds["stock"]}, {**found, "tokens_per_second": speeds}


def serving(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """A whole run of more requests than the pool holds: prompts are read beside decoding."""
    num_requests, num_prompt, num_new = sizes.serving
    prompts = random_tokens(num_requests, num_prompt)
    found = {name: side.generate(prompts, num_new) for name, side in sides.items()}
    speeds = {name: of["tokens"] / of["seconds"] for name, of in found.items()}
    name = f"serving_{num_requests}x{num_prompt}_{num_new}_ratio"
    return {name: speeds["policy"] / speeds["stock"]}, {**found, "tokens_per_second": speeds}


def memory(sides: Sides, sizes: Sizes) -> tuple[dict[str, float], Results]:
    """Of the device, at the end."""
    return {}, {name: side.memory() | side.stats() for name, side in sides.items()}


Task = Callable[[Sides, Sizes], tuple[dict[str, float], Results]]

TASKS: dict[str, tuple[Task, float]] = {
    "idle": (idle, 30),
    "over_budget": (over_budget, 40),
    "latency": (latency, 30),
    "long_requests": (long_requests, 85),
    "serving": (serving, 50),
    "memory": (memory, 2),
}
"""In the order of their turn, with the seconds that each may take on an H100."""


def check_kept(kept: dict[str, float], settings: Results) -> None:
    """Hold what requests keep to the budget, in tokens: full blocks, and one that is filled.

    Raises:
        AssertionError: it is less, or more by a block in flight beside the one that is filled.
    """
    budget, block_size = settings["budget_tokens"], settings["block_size"]
    assert budget is not None, "there is no budget"
    assert budget <= kept["tokens"] <= budget + 2 * block_size, (
        f"{kept['tokens']:.1f} tokens of a request are kept; the budget is {budget}"
    )


def _decode(side: RemoteEngine, prompts: list[list[int]], num_steps: int) -> Results:
    """Read prompts, then decode; seconds of both, and what is kept in the end."""
    found = {"first_tokens": side.start_decoding(prompts, num_steps + 1)}
    found["seconds"] = side.decode(num_steps) / num_steps
    found |= side.kept_kv()
    settings = side.settings()
    if settings["budget_tokens"] is not None:
        check_kept(found, settings)
    side.stop_decoding()
    return found


def _decode_in_turns(
    sides: Sides, prompts: dict[str, list[list[int]]], sizes: Sizes, stop: bool = True
) -> Results:
    """Steps in which all requests of a side decode: seconds, and what its kernels do."""
    for name, side in sides.items():
        side.start_decoding(prompts[name], sizes.steps())
    seconds = alternate(
        sides, sizes.rounds, lambda side: side.decode(sizes.num_steps) / sizes.num_steps
    )
    kernels = {name: side.profile(sizes.num_steps) for name, side in sides.items()}
    if stop:
        for side in sides.values():
            side.stop_decoding()
    more = added(kernels["policy"], kernels["stock"])
    totals = {name: total_seconds(of) for name, of in kernels.items()}
    return {
        "step_seconds": seconds,
        "step_ratio": ratio(seconds, "policy", "stock"),
        "kernel_seconds": totals,
        "kernel_share": total_seconds(more) / totals["policy"],
        "attention_seconds": {name: attention_seconds(of) for name, of in kernels.items()},
        "added_kernels": {
            name: {
                "microseconds": 1e6 * of.seconds,
                "calls": of.calls,
                "share": of.seconds / totals["policy"],
            }
            for name, of in more.items()
        },
    }


def _thousands(num_tokens: int) -> str:
    return f"{num_tokens // 1024}k" if num_tokens >= 1024 else str(num_tokens)
