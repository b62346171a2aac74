"""What a bounded request buys: prompts larger than the pool, many long requests at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import SamplingParams

from ..engines import engine, manager_of, scheduler_of, worker_of
from ..models import make_llama, random_prompts
from ..platforms import schedules_ahead

BLOCK_SIZE = 32
SEMANTIC = {"sink_tokens": 32, "recent_tokens": 64, "semantic_tokens": 96}
BUDGET_BLOCKS = 6
STEPS_IN_FLIGHT = 1 + schedules_ahead()
MOST_BLOCKS = BUDGET_BLOCKS + STEPS_IN_FLIGHT * 512 // BLOCK_SIZE + 1
"""Of a request: the budget, the tokens of the steps in flight, and the block being filled."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(
        tmp_path_factory.mktemp("small-llama"),
        **SMALL,
    )


@pytest.mark.parametrize("num_groups", [1, 2])
def test_prompt_three_times_the_pool(num_groups: int, llama: str) -> None:
    """It is served, by the same evictions and with the same words as from an ample pool."""
    pool_blocks = 40 * num_groups  # a block of a group of layers is a share of one of them all
    prompts = random_prompts([3 * 40 * BLOCK_SIZE])
    params = SamplingParams(
        max_tokens=80, temperature=0, ignore_eos=True, detokenize=False, logprobs=1
    )
    results = []
    for num_blocks in (pool_blocks, 10 * pool_blocks):
        with engine(
            llama,
            policy="semantic",
            kv_policy_config=SEMANTIC | {"layer_groups": num_groups},
            max_model_len=8192,
            num_gpu_blocks_override=num_blocks,
        ) as llm:
            assert scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks == num_blocks
            (output,) = llm.generate(prompts, params, use_tqdm=False)
            results.append((output.outputs[0].token_ids, llm.trace.by_index()))
            assert llm.trace.num_preemptions == 0
            held = max(llm.trace.max_held.values())
            assert num_groups * held <= num_groups * MOST_BLOCKS < pool_blocks
            managers = scheduler_of(llm).kv_policy_managers.values()
            assert sum(manager.stats.evicted_blocks for manager in managers) > 2 * pool_blocks
            assert sum(manager.stats.evicting_requests for manager in managers) == 1
    assert results[0] == results[1]


def test_a_context_of_a_million_on_64_blocks(tmp_path: Path) -> None:
    """Nothing of the policy's grows with the longest request there might be."""
    model = make_llama(
        tmp_path,
        **SMALL,
        max_position_embeddings=1 << 20,
    )
    prompts = random_prompts([5000, 300])
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, detokenize=False)
    results = []
    for max_model_len, num_blocks in ((1 << 20, 64), (8192, 400)):
        with engine(
            model,
            policy="semantic",
            kv_policy_config=SEMANTIC,
            max_model_len=max_model_len,
            num_gpu_blocks_override=num_blocks,
            max_num_seqs=8,
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            results.append([output.outputs[0].token_ids for output in outputs])
            worker = worker_of(llm)
            (builder,) = worker._builders
            assert builder.buffers.block_table.shape == (8, MOST_BLOCKS)
            assert llm.trace.num_preemptions == 0
    assert results[0] == results[1]


def test_stock_refuses_that_prompt(llama: str) -> None:
    """The comparison above means something: without a policy the engine does not start."""
    with (
        pytest.raises(ValueError, match="KV cache"),
        engine(llama, max_model_len=8192, num_gpu_blocks_override=40),
    ):
        pass


def test_many_long_requests_without_preemption(small_llama: str) -> None:
    """64 requests, each ten budgets long, on a pool for 8 full ones."""
    num_prompt, num_new = 200, 10 * BUDGET_BLOCKS * BLOCK_SIZE - 200
    blocks_per_request = (num_prompt + num_new) // BLOCK_SIZE
    kwargs = {
        "num_gpu_blocks_override": 8 * blocks_per_request + 1,
        "max_model_len": 2048,
        "max_num_seqs": 64,
    }
    prompts = random_prompts([num_prompt] * 64)
    params = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, detokenize=False)
    with engine(small_llama, policy="semantic", kv_policy_config=SEMANTIC, **kwargs) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [num_new] * 64
        assert llm.trace.num_preemptions == 0
        assert manager_of(llm).stats.evicting_requests == 64
        assert max(llm.trace.max_held.values()) <= BUDGET_BLOCKS + STEPS_IN_FLIGHT
    with engine(small_llama, **kwargs) as llm:
        few = SamplingParams(max_tokens=600, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate(prompts, few, use_tqdm=False)
        assert llm.trace.num_preemptions > 0
