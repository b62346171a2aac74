"""The same request evicts the same blocks, whatever else the engine does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import CompilationMode

from ..engines import engine, reset_trace, scheduler_of
from ..models import random_prompts
from ..platforms import on_gpu, schedules_ahead

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
GROUPS = OPTIONS | {"layer_groups": 2, "layer_skew_tokens": 64}
LENGTHS = [1200, 40, 513, 512, 900, 250]
PROMPTS = random_prompts(LENGTHS)
PARAMS = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, detokenize=False)

Result = list[tuple[tuple[int, ...], dict[int, list[Any]]]]


def run(llm: Any, prompts: list[Any]) -> Result:
    """Tokens and evictions of each prompt."""
    reset_trace(llm)
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


@pytest.fixture(scope="module")
def alone(llama: str) -> Result:
    """The reference: one request at a time, nothing cached."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        results = [run(llm, [prompt])[0] for prompt in PROMPTS]
    assert all(evictions for _, evictions in results[:1] + results[2:])
    return results


def test_in_a_batch(alone: Result, llama: str) -> None:
    """Requests that share steps are chunked otherwise than alone."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        assert run(llm, PROMPTS) == alone


@pytest.mark.skipif(
    not (on_gpu() or shutil.which("g++") or shutil.which("clang++")),
    reason="on a CPU torch.compile needs a C++ compiler",
)
def test_compiled(alone: Result, llama: str) -> None:
    """torch.compile leaves what the hooks do alone."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        assert run(llm, PROMPTS) == alone


def test_with_a_cached_prefix(alone: Result, llama: str) -> None:
    """A prefix hit, also one longer than the budget, leaves the evictions as they are."""
    with engine(
        llama, policy="semantic", kv_policy_config=OPTIONS, enable_prefix_caching=True
    ) as llm:
        assert run(llm, PROMPTS) == alone
        assert_hits_up_to_the_first_eviction(llm, alone)


def assert_hits_up_to_the_first_eviction(llm: Any, alone: Result) -> None:
    """Prompts served for the second time find every exact block."""
    manager = scheduler_of(llm).kv_cache_manager
    manager.log_stats = True
    manager.make_prefix_cache_stats()
    manager.make_prefix_cache_stats()
    assert run(llm, PROMPTS) == alone
    # Exact blocks are those before the first eviction, whose own query is computed anew.
    exact = [min(512, n) - 1 if n > 288 else n - 1 for n in LENGTHS]
    assert manager.make_prefix_cache_stats().hits == sum(n // 32 * 32 for n in exact)


def test_in_groups_of_layers(llama: str) -> None:
    """Each half of the layers evicts what it does alone: in a batch, cached, after a preemption."""
    with engine(llama, policy="semantic", kv_policy_config=GROUPS) as llm:
        alone = [run(llm, [prompt])[0] for prompt in PROMPTS]
    assert any(first != second for _, evicted in alone for first, second in evicted.values())
    with engine(
        llama, policy="semantic", kv_policy_config=GROUPS, enable_prefix_caching=True
    ) as llm:
        assert run(llm, PROMPTS) == alone
        assert_hits_up_to_the_first_eviction(llm, alone)
    # A block of a group is half as large: the same memory as below.
    num_blocks = 2 * (42 if schedules_ahead() else 34)
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=GROUPS,
        num_gpu_blocks_override=num_blocks,
        enable_prefix_caching=True,
    ) as llm:
        assert run(llm, PROMPTS) == alone
        assert llm.trace.num_preemptions > 0


def test_a_cached_prefix_of_a_hybrid_model(gemma: str) -> None:
    """A hit ends where the layers with a window hold the window before it."""
    with engine(
        gemma, policy="semantic", kv_policy_config=OPTIONS, enable_prefix_caching=True
    ) as llm:
        first = run(llm, PROMPTS)
        # vLLM keeps a window at the end of a hit only once it has met the prefix twice.
        assert run(llm, PROMPTS) == first
        assert run(llm, PROMPTS) == first
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [480, 32, 480, 480, 480, 224]
        # Layers with a window have seen what the others lost: theirs are as approximate.
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        hashed = [block for block in pool.blocks if block.block_hash is not None]
        assert max(block.block_hash_num_tokens for block in hashed) == 512


@pytest.mark.parametrize("threshold", [48, 200])
def test_in_small_chunks(threshold: int, alone: Result, llama: str) -> None:
    """Long prompts make way for others; eviction points stay where they are."""
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=OPTIONS,
        long_prefill_token_threshold=threshold,
    ) as llm:
        assert run(llm, PROMPTS) == alone


def test_with_the_window_disabled(alone: Result, llama: str, tmp_path: Path) -> None:
    """A window that is turned off is full attention, and under the policy."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config["sliding_window"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    with engine(
        str(tmp_path), policy="semantic", kv_policy_config=OPTIONS, disable_sliding_window=True
    ) as llm:
        assert run(llm, PROMPTS) == alone


def test_after_preemption_by_priority(alone: Result, llama: str) -> None:
    """The least urgent lose everything, whoever came last."""
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=OPTIONS,
        num_gpu_blocks_override=36,
        scheduling_policy="priority",
    ) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, priority=[3, 1, 2, 6, 5, 4])
        assert llm.trace.num_preemptions > 0
        tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
        assert list(zip(tokens, llm.trace.by_index(), strict=True)) == alone


def test_after_preemption(alone: Result, llama: str) -> None:
    """A request that lost everything and starts over ends where it would have ended."""
    # Too few for all, and scheduling ahead keeps the tokens of two steps in flight.
    num_blocks = 42 if schedules_ahead() else 34
    with engine(
        llama, policy="semantic", kv_policy_config=OPTIONS, num_gpu_blocks_override=num_blocks
    ) as llm:
        results = run(llm, PROMPTS)
        assert llm.trace.num_preemptions > 0
    assert [tokens for tokens, _ in results] == [tokens for tokens, _ in alone]
    assert [evictions for _, evictions in results] == [evictions for _, evictions in alone]


def test_abort_in_prefill_and_decode(llama: str) -> None:
    """Aborted requests leave nothing behind and disturb no other."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        (reference,) = run(llm, PROMPTS[:1])
        reset_trace(llm)
        llm_engine = llm.llm_engine
        for i, prompt in enumerate(PROMPTS):
            llm_engine.add_request(str(i), prompt, PARAMS)
        finished = []
        for step in range(1000):
            finished += [output for output in llm_engine.step() if output.finished]
            if step == 1:  # in prefill
                llm_engine.abort_request(["4"])
            if step == 40:  # in decode, after evictions
                llm_engine.abort_request(["1", "2", "5"])
            if not llm_engine.has_unfinished_requests():
                break
        tokens = {o.request_id: tuple(o.outputs[0].token_ids) for o in finished}
        assert tokens["0"] == reference[0]
        assert len(tokens["3"]) == PARAMS.max_tokens
