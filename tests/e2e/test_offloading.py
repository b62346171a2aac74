"""vLLM's KV offloading under a policy: what is exact travels, what is approximate does not.

The connector and its scheduler are vLLM's, the copies those of ``tests/late_copies.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group

from vllm_semantic.served import REQUEST_KEY

from ..engines import engine, reset_trace
from ..late_copies import Worker
from ..models import random_prompts

pytestmark = pytest.mark.cpu_build("a GPU has vLLM's own copies")

OPTIONS = {
    "sink_tokens": 8,
    "recent_tokens": 64,
    "semantic_tokens": 64,
    "max_request_tokens": 2048,
}
PROMPTS = random_prompts([1200, 700, 900, 610])
BLOCK = 32
BLOCK_BYTES = 64 << 10
FIRST_EVICTION = 512
"""As many tokens of each prompt are exact: a chunk."""


def transfer(num_chunks: int, blocks_per_chunk: int = 1) -> dict[str, Any]:
    """Engine options: host memory for so many chunks of the model ``llama``."""
    extra = {
        "spec_name": "LateCopies",
        "spec_module_path": "tests.late_copies",
        "cpu_bytes_to_use": num_chunks * blocks_per_chunk * BLOCK_BYTES,
        "blocks_per_chunk": blocks_per_chunk,
    }
    config = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return {"kv_transfer_config": config, "enable_prefix_caching": True}


def asking(**options: Any) -> SamplingParams:
    asked = {REQUEST_KEY: options} if options else {}
    return SamplingParams(
        max_tokens=40, temperature=0, ignore_eos=True, detokenize=False, logprobs=1,
        extra_args=asked,
    )  # fmt: skip


Result = tuple[tuple[int, ...], list[float], dict[int, list[Any]]]


def run(llm: Any, prompts: list[Any], **options: Any) -> tuple[list[Result], list[int]]:
    """Tokens, their log-likelihoods and evictions of each prompt; and what it found computed."""
    reset_trace(llm)
    outputs = llm.generate(prompts, asking(**options), use_tqdm=False)
    evictions = {int(name.split("-")[0]): of for name, of in llm.trace.evictions.items()}
    results = []
    for output in outputs:
        (answer,) = output.outputs
        chosen = zip(answer.logprobs, answer.token_ids, strict=True)
        likelihoods = [of[token].logprob for of, token in chosen]
        tokens = tuple(answer.token_ids)
        results.append((tokens, likelihoods, evictions.get(int(output.request_id), {})))
    return results, [output.num_cached_tokens for output in outputs]


def agree(found: list[Result], expected: list[Result]) -> None:
    for (tokens, likelihoods, evicted), (*others, others_evicted) in zip(
        found, expected, strict=True
    ):
        assert tokens == others[0]
        assert likelihoods == pytest.approx(others[1], abs=1e-4)
        assert evicted == others_evicted


@pytest.fixture(scope="module")
def alone(llama: str) -> dict[str, list[Result]]:
    """One request at a time, nothing cached: under the policy, and with the full cache."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        return {
            name: [run(llm, [prompt], name=name)[0][0] for prompt in PROMPTS]
            for name in ("semantic", "full")
        }


@pytest.mark.parametrize("blocks_per_chunk", [1, 4])
def test_exact_blocks_travel(
    alone: dict[str, list[Result]], blocks_per_chunk: int, llama: str
) -> None:
    """The full cache would be another, if it found anything approximate."""
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=OPTIONS,
        **transfer(256 // blocks_per_chunk, blocks_per_chunk),
    ) as llm:
        found, hits = run(llm, PROMPTS)
        agree(found, alone["semantic"])
        assert hits == [0] * len(PROMPTS)
        assert all(evicted for *_, evicted in found)
        for name, most in (("full", FIRST_EVICTION), ("semantic", FIRST_EVICTION - BLOCK)):
            assert llm.reset_prefix_cache()
            found, hits = run(llm, PROMPTS, name=name)
            agree(found, alone[name])
            assert hits == [most] * len(PROMPTS)


def copies() -> Worker:
    """What copies in the engine of this process."""
    worker = get_kv_transfer_group().connector_worker.worker
    assert isinstance(worker, Worker)
    return worker


def test_blocks_are_copied_before_they_are_overwritten(
    alone: dict[str, list[Result]], llama: str
) -> None:
    """With few blocks, one that is evicted is written by another request in the same step."""
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=OPTIONS,
        max_model_len=1280,
        kv_cache_memory_bytes=44 * BLOCK_BYTES,
        **transfer(256),
    ) as llm:
        found, _ = run(llm, PROMPTS)
        agree(found, alone["semantic"])
        assert copies().waited
        assert llm.reset_prefix_cache()
        for prompt, *expected in zip(PROMPTS, alone["full"], strict=True):
            found, hits = run(llm, [prompt], name="full")
            agree(found, expected)
            assert hits == [FIRST_EVICTION]


def test_what_had_no_room_is_not_offered_later(alone: dict[str, list[Result]], llama: str) -> None:
    """The copies of a long request fill host memory until those blocks of another are gone that
    would have been next."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS, **transfer(40)) as llm:
        params = [asking(name="full"), asking()]
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
        assert llm.reset_prefix_cache()
        found, hits = run(llm, [PROMPTS[1]], name="full")
        agree(found, alone["full"][1:2])
        assert hits[0] < FIRST_EVICTION


def test_in_groups_of_layers_with_recall(llama: str) -> None:
    """Each group offers its own blocks, and what came back from host memory is none of them."""
    options = OPTIONS | {"layer_groups": 2, "layer_skew_tokens": 32, "recall_gib": 0.125}
    with engine(llama, policy="semantic", kv_policy_config=options) as llm:
        expected = [run(llm, [prompt])[0][0] for prompt in PROMPTS]
    with engine(llama, policy="semantic", kv_policy_config=options, **transfer(512)) as llm:
        for hits in (0, FIRST_EVICTION - BLOCK):
            found, found_hits = run(llm, PROMPTS)
            agree(found, expected)
            assert found_hits == [hits] * len(PROMPTS)
            assert llm.reset_prefix_cache()
