"""A pool that is too small for a budget and the tokens in flight: which flag helps, and does it."""

from __future__ import annotations

import re

import pytest

from vllm_semantic.engine import pool, scheduler, worker

from ..engines import engine

BLOCKS = 40
BLOCK_BYTES = 2 * 2 * 2 * 32 * 64 * 4  # layers, keys and values, heads, tokens, channels, fp32
KWARGS = {
    "policy": "semantic",
    "kv_cache_memory_bytes": BLOCKS * BLOCK_BYTES,
    "max_model_len": 8192,
    "max_num_seqs": 8,
}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs at start; an engine that starts takes handlers away."""
    found: list[str] = []

    def record(message: str, *args: object) -> None:
        found.append(message % args)

    monkeypatch.setattr(scheduler.logger, "info", record)
    monkeypatch.setattr(worker.logger, "error", record)
    return found


def test_the_flag_that_helps_comes_first(llama: str, log: list[str]) -> None:
    with (
        pytest.raises(ValueError, match="larger than the available KV cache memory"),
        engine(llama, max_num_batched_tokens=2048, **KWARGS),
    ):
        pass
    (message,) = log
    # A budget of 9, 64 in flight and one that is being filled; one of the pool is the null block.
    assert "a request of 8192 tokens needs 74 blocks of 32 tokens, 64 of them for" in message
    assert "the KV cache has 39. What helps: a smaller --max-num-batched-tokens" in message
    flags = ["--max-num-batched-tokens", "--gpu-memory-utilization", "--kv-policy-config"]
    assert sorted(flags, key=message.index) == flags
    (fits,) = re.findall(r"at most (\d+)\)", message)
    log.clear()
    with engine(llama, max_num_batched_tokens=int(fits), **KWARGS) as llm:
        core = llm.llm_engine.engine_core.engine_core
        config = core.vllm_config
        specs = core.model_executor.driver_worker.worker.get_kv_cache_spec()
        memory = KWARGS["kv_cache_memory_bytes"]
        assert pool.explain_shortage(config, specs, memory) is None
        short = pool.explain_shortage(config, specs, memory - 1)
        assert short is not None
        assert f"(at most {int(fits) - 32})" in short
        (explained,) = (line for line in log if "the KV cache size above" in line)
        numbers = re.findall(r"[\d,.]*\d", explained)
        size, requests, length, in_flight, blocks, block_size = (
            float(number.replace(",", "")) for number in numbers
        )
        assert size == pytest.approx(requests * length, rel=0.01)
        assert (length, in_flight, blocks, block_size) == (8192, int(fits), BLOCKS - 1, 32)


def test_groups_of_layers_need_blocks_in_each(llama: str, log: list[str]) -> None:
    kwargs = KWARGS | {"kv_policy_config": {"layer_groups": 2}}
    with (
        pytest.raises(ValueError, match="larger than the available KV cache memory"),
        engine(llama, max_num_batched_tokens=2048, **kwargs),
    ):
        pass
    (message,) = log
    # Twice what one group of all layers needs, of twice as many blocks.
    assert "a request of 8192 tokens needs 148 blocks of 32 tokens, 128 of them for" in message
    assert "the KV cache has 79. What helps" in message
    (fits,) = re.findall(r"at most (\d+)\)", message)
    with (
        pytest.raises(ValueError, match="larger than the available KV cache memory"),
        engine(llama, max_num_batched_tokens=int(fits) + 1, **kwargs),
    ):
        pass
    log.clear()
    with engine(llama, max_num_batched_tokens=int(fits), **kwargs):
        assert not any("What helps" in line for line in log)
    held = -(-8192 // 32), 9 + 1
    fit = [79 // (2 * held[0]), (79 - 2 * (int(fits) // 32)) // (2 * held[1])]
    (capacity,) = (line for line in log if "the full cache would hold" in line)
    assert f"79 blocks hold {fit[1]} requests of 8192 tokens" in capacity
    assert capacity.endswith(f"the full cache would hold {fit[0]}")


def test_a_request_that_never_evicts_is_vllms_to_explain(llama: str, log: list[str]) -> None:
    with (
        pytest.raises(ValueError, match="larger than the available KV cache memory"),
        engine(llama, max_num_batched_tokens=2048, **KWARGS | {"max_model_len": 2048}),
    ):
        pass
    assert not log
