"""Streaming-input sessions: prompts that grow keep the eviction points that they had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.host import make_scheduler
from vllm_semantic import register
from vllm_semantic.engine.spec import semantic_spec
from vllm_semantic.hooks import SCHEDULERS
from vllm_semantic.messages import attach_scores, step_of
from vllm_semantic.policies.selection import (
    EarlierTurn,
    eviction_point_of_turns,
    is_eviction_point,
    prompt_end,
)
from vllm_semantic.served import ServedPolicies

BLOCK_SIZE = 4
TURNS = (18, 13, 22)
"""Tokens of prompt in each turn."""
ANSWERS = 9
"""Tokens of each answer; the next turn drops the last, which was not computed yet."""


def test_points_of_earlier_turns_stay() -> None:
    turns = [EarlierTurn(10, 17), EarlierTurn(30, 38)]
    found = [
        n
        for n in range(60)
        if is_eviction_point(n, prompt_end(n, 50, turns), BLOCK_SIZE, prefill_interval=25)
    ]
    # A prompt of 10 and its answer; then up to 30 and its answer; then up to 50, and on.
    assert found == [0, 10, 12, 16, 25, 30, 32, 36, 50, 52, 56]
    for n in range(57):
        expected = min(point for point in found if point >= n)
        assert eviction_point_of_turns(n, 50, turns, BLOCK_SIZE, 25) == expected


def session(llama: str, interrupted_at: int | None) -> tuple[dict[int, list[int]], int]:
    """What a session evicts, by computed tokens, and how often it was preempted."""
    register()
    config = EngineArgs(
        model=llama,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=16,
        block_size=32,
        enable_prefix_caching=False,
    ).create_engine_config()
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    policy = {"name": "semantic", "sink_tokens": 4, "recent_tokens": 4, "semantic_tokens": 8}
    spec = semantic_spec(full, ServedPolicies.from_config(policy), config)
    scheduler = make_scheduler(resolve_obj_by_qualname(SCHEDULERS[False]), config, [spec], 64)
    params = SamplingParams(max_tokens=ANSWERS, temperature=0, ignore_eos=True)
    request = Request("s", [7] * TURNS[0], params, None, resumable=True)
    scheduler.add_request(request)
    coming = list(TURNS[1:])
    evicted: dict[int, list[int]] = {}
    for step in range(200):
        if step == interrupted_at:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if coming and request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            more = Request("s", [7] * coming.pop(0), params, None, resumable=True)
            scheduler.add_request(more)
        output: Any = scheduler.schedule()
        if not output.num_scheduled_tokens:
            continue
        ours = step_of(output)
        start = request.num_computed_tokens - output.num_scheduled_tokens["s"]
        if start == 0:
            evicted = {}
        if ours and ours.evictions:
            evicted[start] = ours.evictions[0]["s"]
        done = request.num_computed_tokens >= request.num_tokens
        result = ModelRunnerOutput(["s"], {"s": 0}, sampled_token_ids=[[7] if done else []])
        if ours and ours.score_requests:
            asked = ours.score_requests[0]["s"]
            scores = [hash((asked.num_tokens, i)) % 7 for i in asked.block_indices]
            attach_scores(result, {0: {"s": scores}})
        scheduler.update_from_output(output, result)
    assert not coming
    assert request.num_prompt_tokens == sum(TURNS) + (len(TURNS) - 1) * (ANSWERS - 1)
    return evicted, request.num_preemptions


@pytest.mark.parametrize("interrupted_at", [5, 14, 19, 26])
def test_a_session_evicts_the_same_when_it_is_computed_again(
    interrupted_at: int, llama: str
) -> None:
    alone, never = session(llama, None)
    again, times = session(llama, interrupted_at)
    assert (never, times) == (0, 1)
    assert len(alone) > 8
    assert again == alone
