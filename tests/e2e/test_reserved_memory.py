"""The memory that is taken from the KV cache is what the buffers beside it need."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_semantic.engine import worker as worker_module
from vllm_semantic.engine.reserved_memory import ReservedMemory, reserved_memory

from ..engines import engine, worker_of

GIB = 1 << 30


def reserved_by(worker: Any) -> ReservedMemory:
    layers = get_layers_from_vllm_config(worker.vllm_config, Attention)
    specs = worker.get_kv_cache_spec()
    return reserved_memory(worker.vllm_config, specs, layers, GIB, worker.model_runner.device)


@pytest.mark.parametrize("policy", ["semantic", "streaming", "full"])
def test_buffers_are_reserved(llama: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def record(message: str, *args: object, **kwargs: object) -> None:
        log.append(message % args)

    monkeypatch.setattr(worker_module.logger, "info", record)
    with engine(llama, policy=policy, max_num_seqs=24) as llm:
        worker = worker_of(llm)
        reserved = reserved_by(worker)
        # Tests say how large their KV cache is.
        assert [line for line in log if line.endswith("beside --kv-cache-memory-bytes")] == [
            f"KV policy {policy}: {reserved} beside --kv-cache-memory-bytes"
        ]
        groups = worker._block_scorer.groups.values()
        rings = sum(layers.queries.nbytes for group in groups for layers in group)
        assert reserved.queries == rings
        tables = sum(
            buffer.nbytes
            for builder in worker._builders
            for buffer in (builder.buffers.block_table, builder.buffers.seq_lens)
        )
        assert tables <= reserved.tables <= 4 * tables
        assert (reserved.queries > 0, reserved.tables > 0) == {
            "semantic": (True, True),
            # A request may ask for `semantic` there, too.
            "streaming": (True, True),
            "full": (True, True),
        }[policy]
        # Where vLLM finds out how large the cache may be, it is smaller by as much.
        monkeypatch.setattr(worker.cache_config, "kv_cache_memory_bytes", None)
        specs = worker.get_kv_cache_spec()
        assert worker._reserve(specs, GIB) == reserved.total
        assert log[-1] == f"KV policy {policy}: {reserved} taken from the KV cache"
        # What requests may not ask for needs nothing.
    with engine(
        llama, policy=policy, max_num_seqs=24, kv_policy_config={"max_request_tokens": 0}
    ) as llm:
        reserved = reserved_by(worker_of(llm))
        assert (reserved.queries > 0) == (reserved.scoring > 0) == (policy == "semantic")
        assert (reserved.tables > 0) == (policy != "full")
