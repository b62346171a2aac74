"""Speculation under a policy: the same tokens and evictions as without, in fewer steps.

On Runner V2 these run where steps are scheduled ahead, which V1 does not draft for.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from .. import interpreter
from ..engines import engine, manager_of, worker_of
from ..models import make_draft, make_eagle, make_eagle3, make_mimo, make_shallow
from ..platforms import schedules_ahead
from .test_recall import PROMPTS, Result, run

NGRAM = {
    "method": "ngram_gpu" if schedules_ahead() else "ngram",
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
OPTIONS = {
    "sink_tokens": 8,
    "recent_tokens": 64,
    "semantic_tokens": 128,
    "recall_gib": 0.125,
    "recall_blocks": 1,
}
IN_GROUPS = {"layer_groups": 2}
BLOCKS = 50 if schedules_ahead() else 34
"""A pool that holds little more than one request at its largest: with two steps of 512 tokens in
flight, or one."""
MAX_TOKENS = 40 if interpreter.wanted() else 150  # interpreted, a second takes minutes
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, detokenize=False)


def counted(llm: Any, name: str) -> int:
    (metric,) = (of for of in llm.get_metrics() if of.name == f"vllm:spec_decode_num_{name}")
    return int(metric.value)


def serve(model: str, options: dict[str, Any], **kwargs: Any) -> Result:
    """What comes of the prompts without speculation."""
    with engine(model, policy="semantic", kv_policy_config=options, **kwargs) as llm:
        return run(llm, PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shallow(tmp_path_factory.mktemp("shallow"))


@pytest.fixture(scope="module")
def without_head(shallow: str) -> Result:
    return serve(shallow, OPTIONS)


@pytest.fixture(scope="module")
def without(llama: str) -> Result:
    return serve(llama, OPTIONS)


@pytest.fixture(scope="module")
def in_groups(llama: str) -> Result:
    return serve(llama, OPTIONS | IN_GROUPS)


def speculate(
    model: str, options: dict[str, Any], drafter: dict[str, Any], num_blocks: int, **kwargs: Any
) -> dict[str, Any]:
    """What comes of the prompts together and, the first two with a cached prefix, alone, and what
    was drafted."""
    with engine(
        model,
        policy="semantic",
        kv_policy_config=options,
        speculative_config={"num_speculative_tokens": 4} | drafter,
        disable_log_stats=False,
        enable_prefix_caching=True,
        num_gpu_blocks_override=num_blocks,
        **kwargs,
    ) as llm:
        together = run(llm, PROMPTS, PARAMS)
        num_preemptions = llm.trace.num_preemptions
        return {
            "together": together,
            "preemptions": num_preemptions,
            "alone": [run(llm, [prompt], PARAMS)[0] for prompt in PROMPTS[:2]],
            "accepted": counted(llm, "accepted_tokens"),
            "drafted": counted(llm, "draft_tokens"),
            "fallbacks": manager_of(llm).stats.fallbacks,
            "host layers": sum(len(of.kv_cache) for of in worker_of(llm)._host.caches(0)),
        }


def check(
    without: Result,
    model: str,
    options: dict[str, Any],
    drafter: dict[str, Any],
    num_blocks: int,
    host_layers: int,
    **kwargs: Any,
) -> float:
    """Hold an engine that speculates to one that does not; the share of its drafts that is right.

    In a process of its own: speculation loads numba, and vLLM's search for the kernels of the next
    engine (vllm/triton_utils/dispatcher.py) fails on an object of it.
    """
    prepare = interpreter.install if interpreter.wanted() else None
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare) as pool:
        found = pool.submit(speculate, model, options, drafter, num_blocks, **kwargs).result()
    assert found["together"] == without
    assert found["alone"] == without[:2]
    assert found["preemptions"] > 0
    assert found["fallbacks"] == 0
    assert found["host layers"] == host_layers, "whose blocks go out and come back"
    assert sum(bool(evicted) for _, evicted, _ in without) == 5
    assert any(recalled for _, _, recalled in without)
    return float(found["accepted"] / found["drafted"])


def test_drafts_change_nothing(in_groups: Result, llama: str) -> None:
    """A block goes when every token in it is settled, whatever was drafted and rejected."""
    share = check(in_groups, llama, OPTIONS | IN_GROUPS, NGRAM, 2 * BLOCKS, host_layers=1)
    assert 0 < share < 1, "all were right, or none"


def test_a_model_that_drafts_sees_what_is_held(without: Result, llama: str, tmp_path: Path) -> None:
    """Its blocks are those of the request: read where some had gone, most drafts would be wrong."""
    drafter = {"method": "draft_model", "model": make_draft(llama, tmp_path)}
    share = check(without, llama, OPTIONS, drafter, BLOCKS, host_layers=4)
    assert 0.4 < share < 1


def test_a_model_of_another_shape_drafts(without: Result, llama: str, tmp_path: Path) -> None:
    """The same, with blocks of twice the size."""
    drafter = {"method": "draft_model", "model": make_draft(llama, tmp_path, kv_repeats=2)}
    share = check(without, llama, OPTIONS, drafter, BLOCKS, host_layers=4)
    assert 0.4 < share < 1


def test_eagle(without_head: Result, shallow: str, tmp_path: Path) -> None:
    drafter = {"method": "eagle", "model": make_eagle(shallow, tmp_path)}
    share = check(without_head, shallow, OPTIONS, drafter, BLOCKS, host_layers=3)
    assert 0.3 < share < 1


def test_eagle3(without_head: Result, shallow: str, tmp_path: Path) -> None:
    drafter = {"method": "eagle3", "model": make_eagle3(shallow, tmp_path)}
    share = check(without_head, shallow, OPTIONS, drafter, BLOCKS, host_layers=3)
    assert 0.05 < share < 1, "one in 512 would be chance"


def test_mtp(tmp_path: Path) -> None:
    """A layer of the model's own drafts."""
    mimo = make_mimo(tmp_path)
    drafter = {"method": "mtp", "num_speculative_tokens": 1}
    share = check(serve(mimo, OPTIONS), mimo, OPTIONS, drafter, BLOCKS, host_layers=3)
    assert 0.3 < share < 1


@pytest.mark.skipif(not schedules_ahead(), reason="the tests above do not schedule ahead here")
def test_a_step_at_a_time(llama: str, tmp_path: Path) -> None:
    """Where a GPU is told not to schedule ahead."""
    drafter = {"method": "draft_model", "model": make_draft(llama, tmp_path)}
    kwargs = {"async_scheduling": False}
    check(serve(llama, OPTIONS, **kwargs), llama, OPTIONS, drafter, 27, host_layers=4, **kwargs)
