"""Decode steps that change no block of a request ask vLLM's block managers nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from benchmarks.host import make_scheduler
from vllm_semantic import register
from vllm_semantic.engine.spec import semantic_spec
from vllm_semantic.served import ServedPolicies
from vllm_semantic.upstream.hooks import SCHEDULERS

BLOCK_SIZE = 32
NUM_BLOCKS = 8
"""Of decoding, behind a prompt that ends with a block."""

SETTLED = {
    "never reached": {"name": "semantic", "semantic_tokens": 4096},
    "over budget": {"name": "streaming", "sink_tokens": 32, "recent_tokens": 64},
}


@pytest.mark.parametrize("policy", SETTLED.values(), ids=SETTLED.keys())
@pytest.mark.parametrize("caching", [False, True], ids=["no cache", "prefix cache"])
def test_one_block_asks_once_or_twice(
    policy: dict[str, Any], caching: bool, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register()
    config = EngineArgs(
        model=llama,
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_batched_tokens=512,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=caching,
    ).create_engine_config()
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    spec = semantic_spec(full, ServedPolicies.from_config(policy), config)
    scheduler = make_scheduler(resolve_obj_by_qualname(SCHEDULERS[False]), config, [spec], 64)
    asked = 0
    allocate_slots = KVCacheManager.allocate_slots

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += 1
        return allocate_slots(*args, **kwargs)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", counting)
    params = SamplingParams(max_tokens=1024, temperature=0, ignore_eos=True)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if caching else None
    scheduler.add_request(Request("a", [7] * 8 * BLOCK_SIZE, params, None, block_hasher=hasher))
    for _ in range(NUM_BLOCKS * BLOCK_SIZE):
        output = scheduler.schedule()
        result = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[7]])
        scheduler.update_from_output(output, result)
    manager = scheduler.kv_policy_managers[0]
    assert len(manager.req_to_blocks["a"]) == 8 + NUM_BLOCKS
    assert bool(manager.stats.evictions) == (policy["name"] == "streaming")
    # A block is needed once; while it can be shared, it is also offered once.
    assert NUM_BLOCKS <= asked <= 1 + NUM_BLOCKS * (1 + caching)
