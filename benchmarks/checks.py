"""Correctness on the device at hand, in small engines side by side.

The bundled model has real weights; what it says means more than what random ones say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from vllm_semantic.upstream.hooks import DEFAULT_BLOCK_SIZE

from . import texts
from .context import MODEL
from .engines import RemoteEngine, starting
from .figures import random_tokens
from .shapes import kv_bytes

AT_ONCE = {"gpu": 3, "cpu": 1}
"""Checks at a time. Each has at most two engines, and two more may be starting: a machine whose
cores are slow starts no more than eight processes at once in a time worth having."""

CHECK_SECONDS = 240
"""What a check may take, the start of its engines included."""

NUM_NEW = 96
"""Tokens that a request decodes: past some eviction points."""

NUM_TOKENS = 16384
"""What a KV pool holds of float32."""

Found = dict[str, Any]
Check = Callable[[], Found]


def names(on_gpu: bool) -> list[str]:
    """The checks of a platform: its attention backends, NF4, the oracle."""
    backends = ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "XFORMERS"] if on_gpu else ["CPU_ATTN"]
    return [*backends, "NF4", "oracle"]


def prepare(wanted: list[str], on_gpu: bool) -> dict[str, Check]:
    """The checks of some names, with all that they need of transformers.

    Its lazy modules cannot be imported from two threads at once.
    """
    return {name: _check(name, on_gpu) for name in wanted}


def run(prepared: Mapping[str, Check], on_gpu: bool) -> Iterator[tuple[str, Found]]:
    """Each check with what it found, as they end; one that fails says why and ends no other."""
    with ThreadPoolExecutor(AT_ONCE["gpu" if on_gpu else "cpu"]) as pool:
        running = {pool.submit(_outcome, check): name for name, check in prepared.items()}
        for done in as_completed(running):
            yield running[done], done.result()


def _check(name: str, on_gpu: bool) -> Check:
    kwargs: dict[str, Any] = {
        "enforce_eager": not on_gpu,
        "kv_cache_memory_bytes": kv_bytes(str(MODEL), NUM_TOKENS, itemsize=4),
    }
    if on_gpu:
        kwargs |= {"gpu_memory_utilization": 0.02}  # of what has to be free at start
        kwargs |= {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}
    if name == "oracle":
        documents = texts.documents("pg19", str(MODEL), 700)[:2]
        return lambda: against_oracle(kwargs, documents)
    platform = "cuda" if on_gpu else "cpu"
    kwargs["block_size"] = DEFAULT_BLOCK_SIZE["xformers" if name == "XFORMERS" else platform]
    if name == "NF4":
        return lambda: in_nf4(kwargs)
    # The CPU platform has one backend, and does not take it by its name.
    return lambda: against_stock(kwargs | ({"attention_backend": name} if on_gpu else {}))


def _outcome(check: Check) -> Found:
    try:
        return {"passed": True, **check()}
    except Exception as error:  # whatever it was, it is the result
        return {"passed": False, "error": f"{type(error).__name__}: {error}"[-2000:]}


def small_engine(policy: str | None, kwargs: dict[str, Any], **more: Any) -> Any:
    """An engine of the bundled model, in which a step that waits for the device is an error."""
    return starting(
        str(MODEL),
        policy,
        max_model_len=2048,
        max_num_seqs=8,
        seconds=CHECK_SECONDS,
        environment={
            "VLLM_GPU_SYNC_CHECK": "error",
            "TRITON_F32_DEFAULT": "ieee",  # or its products of float32 are of 10 bits
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all engines share one core
        },
        **kwargs,
        **more,
    )


def against_stock(kwargs: dict[str, Any]) -> Found:
    """Tokens with a budget that is never reached, and in a batch that evicts.

    In 16 bits a batch may round otherwise than a request alone, so that shares are told.

    Raises:
        RuntimeError: nothing was evicted, or many answers are not as they should be.
    """
    half = kwargs | {"dtype": "bfloat16", "forcing": False}
    prompts = random_tokens(4, 300) + random_tokens(2, 900)
    ample = [{"kv_policy": {"semantic_tokens": 1536}}] * len(prompts)
    with (
        small_engine(None, half) as stock,
        small_engine("semantic", half, options={"max_request_tokens": 2048}) as side,
    ):
        expected = stock.tokens(prompts, NUM_NEW)
        answers = side.tokens(prompts, NUM_NEW, ample)
        if evicted := side.stats()["evicted_blocks"]:
            raise RuntimeError(f"{evicted} blocks were evicted although the budget holds all")
        together = side.tokens(prompts, NUM_NEW)
        alone = [side.tokens([prompt], NUM_NEW)[0] for prompt in prompts]
        found: Found = {
            "engine": side.chosen(),
            "ample_budget_equals_stock": share_equal(expected, answers),
            "batch_equals_alone": share_equal(together, alone),
            "evicting_equals_stock": share_equal(expected, together),
            "evicted_blocks": side.stats()["evicted_blocks"],
            "weight_bytes": side.stats()["weight_bytes"],
        }
    shares = found["ample_budget_equals_stock"], found["batch_equals_alone"]
    if min(shares) < 0.75 or not found["evicted_blocks"]:
        raise RuntimeError(f"this is not as it should be: {found}")
    return found


def in_nf4(kwargs: dict[str, Any]) -> Found:
    """The same with weights of four bits.

    Raises:
        RuntimeError: as above, or the weights are no smaller than that.
    """
    found = against_stock(kwargs | {"quantization": "bitsandbytes"})
    in_file = (MODEL / "model.safetensors").stat().st_size
    if found["weight_bytes"] > in_file / 2:
        raise RuntimeError(f"weights of {found['weight_bytes']} bytes, {in_file} in the file")
    return found


def share_equal(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of all texts, how many are the same to the last token."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def against_oracle(kwargs: dict[str, Any], documents: list[list[int]]) -> Found:
    """Log-likelihoods of real text in float32, over budget, against transformers'.

    Beside it the scoring kernels against their references.

    Raises:
        RuntimeError: nothing was evicted, or the two differ by more than rounding.
    """
    with small_engine("semantic", kwargs, dtype="float32", max_num_batched_tokens=512) as side:
        found: Found = {"engine": side.chosen(), "kernel_differences": side.kernels()}
        found |= likelihood_differences(side, documents, num_prompt=400)
    # Float32 on both sides: its unit roundoff times the sums behind a logit (width x layers x 16).
    found["allowed_difference"] = 2**-24 * 256 * 6 * 16
    if not found["evicted_blocks"] or found["largest_difference"] > found["allowed_difference"]:
        raise RuntimeError(f"this is not as it should be: {found}")
    return found


def likelihood_differences(
    side: RemoteEngine, documents: list[list[int]], num_prompt: int
) -> Found:
    """Of the engine's own policy, with its defaults, from the oracle's."""
    from tests.oracle import Case, judge

    settings = side.settings()
    nll = side.nll(documents, num_prompt)["nll"]
    cases = [
        Case(
            str(MODEL),
            document,
            num_prompt_tokens=num_prompt,
            block_size=settings["block_size"],
            prefill_interval=512,
            sink_tokens=8,
            recent_tokens=128,
            selected_tokens=128,
            rule="contribution, max",
            eviction_delay=int(settings["async_scheduling"]),
        )
        for document in documents
    ]
    differences = [
        abs(-loss - logprob)
        for losses, verdict in zip(nll, judge(cases), strict=True)
        for loss, logprob in zip(losses, verdict.logprobs, strict=True)
    ]
    return {
        "mean_difference": sum(differences) / len(differences),
        "largest_difference": max(differences),
        "evicted_blocks": side.stats()["evicted_blocks"],
    }
