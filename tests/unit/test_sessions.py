"""Streaming-input sessions: prompts that grow keep the eviction points that they had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.host import make_scheduler
from vllm_semantic import register
from vllm_semantic.engine.refusal import KVPolicyError
from vllm_semantic.engine.sessions import asked_by, under_one_policy
from vllm_semantic.engine.spec import semantic_spec
from vllm_semantic.messages import attach_scores, policy_of, step_of
from vllm_semantic.policies.selection import (
    EarlierTurn,
    eviction_point_of_turns,
    is_eviction_point,
    prompt_end,
)
from vllm_semantic.served import ServedPolicies
from vllm_semantic.upstream.hooks import SCHEDULERS

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


SEMANTIC = {"name": "semantic", "sink_tokens": 4, "recent_tokens": 4, "semantic_tokens": 8}


def make_config(llama: str, caching: bool = False, **kwargs: Any) -> Any:
    register()
    return EngineArgs(
        model=llama,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_batched_tokens=16,
        block_size=32,
        enable_prefix_caching=caching,
        **kwargs,
    ).create_engine_config()


def scheduler_under(
    llama: str,
    asynchronous: bool = False,
    block_size: int = BLOCK_SIZE,
    num_slots: int = 0,
    num_blocks: int = 64,
    caching: bool = False,
    **policy: Any,
) -> Any:
    """A scheduler under the policy above."""
    config = make_config(llama, caching)
    full = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    config.scheduler_config.async_scheduling = asynchronous
    served = ServedPolicies.from_config(SEMANTIC | policy)
    spec = semantic_spec(full, served, config, num_slots=num_slots)
    scheduler = resolve_obj_by_qualname(SCHEDULERS[asynchronous])
    return make_scheduler(scheduler, config, [spec], num_blocks)


def result_of(output: Any, sampled: list[str]) -> ModelRunnerOutput:
    """What a step answers: a token for those that have read their prompt."""
    ids = list(output.num_scheduled_tokens)
    tokens = [[7] if request_id in sampled else [] for request_id in ids]
    result = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled_token_ids=tokens)
    ours = step_of(output)
    if ours and ours.score_requests:
        asked = ours.score_requests[0]
        scores = {
            r: [float(hash((of.num_tokens, i)) % 7) for i in of.scored_indices]
            for r, of in asked.items()
        }
        attach_scores(result, {0: scores})
    return result


def session(llama: str, interrupted_at: int | None) -> tuple[dict[int, list[int]], int]:
    """What a session evicts, by computed tokens, and how often it was preempted."""
    scheduler = scheduler_under(llama)
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
        scheduler.update_from_output(output, result_of(output, ["s"] if done else []))
    assert not coming
    assert request.num_prompt_tokens == sum(TURNS) + (len(TURNS) - 1) * (ANSWERS - 1)
    return evicted, request.num_preemptions


def recalling_session(llama: str, turns: list[int], interrupted_at: int | None) -> set[int]:
    """Where a session that recalls asks for scores, in blocks of 16; each time with the queries
    before it."""
    parts = {"sink_tokens": 16, "recent_tokens": 16, "semantic_tokens": 16}
    scheduler = scheduler_under(llama, block_size=16, num_slots=64, **parts)
    params = SamplingParams(max_tokens=ANSWERS, temperature=0, ignore_eos=True)
    coming = [Request("s", [7] * length, params, None, resumable=True) for length in turns]
    request = coming.pop(0)
    scheduler.add_request(request)
    asked_at: set[int] = set()
    ring: dict[int, int] = {}
    for step in range(200):
        runs = request.status == RequestStatus.RUNNING
        if runs and interrupted_at is not None and step >= interrupted_at:
            scheduler.reset_prefix_cache(reset_running_requests=True)
            interrupted_at = None
        if coming and request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            scheduler.add_request(coming.pop(0))
        output: Any = scheduler.schedule()
        if not output.num_scheduled_tokens:
            continue
        end = request.num_computed_tokens
        start = end - output.num_scheduled_tokens["s"]
        if start == 0:
            asked_at, ring = set(), {}
        ours = step_of(output)
        if ours and "s" in ours.keeps_queries:
            ring |= {position % 8: position for position in range(max(start, end - 8), end)}
        if ours and ours.score_requests:
            asked_at.add(end)
            shown = [ring.get(position % 8) for position in range(end - 8, end)]
            assert shown == [*range(end - 8, end)], "scored by queries of other tokens"
        done = end >= request.num_tokens
        scheduler.update_from_output(output, result_of(output, ["s"] if done else []))
    assert not coming
    assert interrupted_at is None, "it never ran again"
    return asked_at


@pytest.mark.parametrize("turns", [[100, 4, 20], [100, 24, 5], [90, 2, 3]])
def test_the_next_turn_of_a_session_asks_with_its_own_queries(llama: str, turns: list[int]) -> None:
    asked_at = recalling_session(llama, turns, None)
    end = turns[0]
    for length in turns[1:]:
        end += ANSWERS - 1 + length
        assert end in asked_at, "a turn that asks"
    for interrupted_at in (8, 17, 20, 26):
        assert recalling_session(llama, turns, interrupted_at) == asked_at


@pytest.mark.parametrize("interrupted_at", [5, 14, 19, 26])
def test_a_session_evicts_the_same_when_it_is_computed_again(
    interrupted_at: int, llama: str
) -> None:
    alone, never = session(llama, None)
    again, times = session(llama, interrupted_at)
    assert (never, times) == (0, 1)
    assert len(alone) > 8
    assert again == alone


def chunk(length: int, asked: Any = None, max_tokens: int = 2, request_id: str = "s") -> Request:
    extra_args = None if asked is None else {"kv_policy": asked}
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra_args
    )
    return Request(request_id, list(range(length)), params, None, resumable=True)


def run(scheduler: Any) -> list[Any]:
    """All that the engine answers until nothing is left to do."""
    answers = []
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        done = [
            r
            for r in output.num_scheduled_tokens
            if scheduler.requests[r].num_computed_tokens >= scheduler.requests[r].num_tokens
        ]
        for of_client in scheduler.update_from_output(output, result_of(output, done)).values():
            answers += of_client.outputs
    return answers


@pytest.mark.parametrize("queued", [False, True])
def test_a_session_preempted_with_its_last_token_in_flight_goes_on(
    queued: bool, llama: str
) -> None:
    """vLLM alone forgets all that was said, and the session, which then waits for ever."""
    scheduler = scheduler_under(llama, asynchronous=True)
    request = chunk(10)
    scheduler.add_request(request)
    if queued:
        scheduler.add_request(chunk(3))
    steps = [scheduler.schedule(), scheduler.schedule()]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    for step in steps:
        scheduler.update_from_output(step, result_of(step, ["s"]))
    if not queued:
        assert request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        scheduler.add_request(chunk(3))
    said = [*range(10), 7, *range(3)]
    assert request.prompt_token_ids == list(request.all_token_ids) == said
    assert run(scheduler)[-1].finish_reason is not None
    assert request.num_computed_tokens == len(said) + 1
    assert list(request.all_token_ids) == [*said, 7, 7]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("first", "later"),
    [
        (None, "streaming"),
        ("streaming", "semantic"),
        ("streaming", {"name": "streaming", "recent_tokens": 64}),
        ("streaming", "smart"),
    ],
)
def test_a_chunk_under_another_policy_ends_its_session(
    first: Any, later: Any, waits: bool, llama: str
) -> None:
    """The frontend refuses it; what comes to the scheduler all the same ends with an error."""
    scheduler = scheduler_under(llama, max_request_tokens=256)
    scheduler.add_request(chunk(10, first))
    scheduler.add_request(Request("other", [5] * 40, chunk(1, max_tokens=20).sampling_params, None))
    if waits:
        run_until_it_waits(scheduler)
    scheduler.add_request(chunk(3, later))
    answers = run(scheduler)
    assert [a.finish_reason for a in answers if a.request_id == "s"][-1] == FinishReason.ERROR
    assert [a.finish_reason for a in answers if a.request_id == "other"][-1] == FinishReason.LENGTH
    assert not scheduler.requests
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def run_until_it_waits(scheduler: Any) -> None:
    session = scheduler.requests["s"]
    while session.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
        output = scheduler.schedule()
        scheduler.update_from_output(output, result_of(output, list(output.num_scheduled_tokens)))


def test_a_chunk_without_a_policy_stays_under_the_sessions(llama: str) -> None:
    scheduler = scheduler_under(llama, max_request_tokens=512)
    request = chunk(10, "streaming")
    scheduler.add_request(request)
    scheduler.add_request(chunk(3))
    scheduler.add_request(chunk(3, {"name": "streaming"}))
    assert run(scheduler)[-1].finish_reason == FinishReason.LENGTH
    assert request.num_prompt_tokens == 18
    assert policy_of(request, None).name == "streaming"


def test_a_session_that_outgrows_its_policy_ends(llama: str) -> None:
    scheduler = scheduler_under(llama, max_request_tokens=32)
    scheduler.add_request(chunk(10, "full"))
    scheduler.add_request(chunk(10))
    scheduler.add_request(chunk(20))
    answers = run(scheduler)
    assert answers[-1].finish_reason == FinishReason.ERROR
    assert [a.finish_reason for a in answers].count(FinishReason.LENGTH) == 2
    assert not scheduler.requests


async def chunks_of(asked: list[Any]) -> AsyncGenerator[StreamingInput, None]:
    for each in asked:
        params = None if each is Ellipsis else chunk(1, each).sampling_params
        yield StreamingInput(prompt={"prompt_token_ids": [1]}, sampling_params=params)


OTHER_WORDS = {"name": "semantic", "similarity": "contribution"}


@pytest.mark.parametrize(
    ("of_session", "asked", "expected"),
    [
        (None, [..., ...], [None, None]),
        (None, [None, ...], [None, None]),
        (None, ["streaming", None, ...], ["streaming", "streaming", None]),
        ("streaming", [None, ..., "streaming"], ["streaming", None, "streaming"]),
        (None, [None, "semantic", OTHER_WORDS], [None, "semantic", OTHER_WORDS]),
        (None, [..., "streaming"], "kv_policy .*streaming.* in a later chunk .*semantic"),
        ("streaming", ["semantic"], "kv_policy .*semantic.* in a later chunk .*streaming"),
        ("streaming", [..., "smart"], "kv_policy.name 'smart' is not served"),
    ],
)
def test_the_chunks_of_a_session_ask_for_one_policy(
    of_session: Any, asked: list[Any], expected: Any, llama: str
) -> None:
    """A chunk without parameters has those of the session."""
    params = chunk(1, of_session).sampling_params
    assert params is not None
    config = make_config(llama, additional_config={"kv_policy": "semantic"})

    async def listen() -> list[Any]:
        chunks = under_one_policy(chunks_of(asked), params, config)
        return [c.sampling_params and asked_by(c.sampling_params) async for c in chunks]

    if isinstance(expected, str):
        with pytest.raises(KVPolicyError, match=expected):
            asyncio.run(listen())
    else:
        assert asyncio.run(listen()) == expected
