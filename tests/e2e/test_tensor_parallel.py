"""Two worker processes that hold half of the heads each do what one does with all of them."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from ..engines import engine, take_fallbacks
from ..models import random_prompts

pytestmark = pytest.mark.devices(2)

OPTIONS = {
    "sink_tokens": 8,
    "recent_tokens": 64,
    "semantic_tokens": 128,
    "recall_gib": 0.125,
    "recall_blocks": 2,
}
PROMPTS = random_prompts([600, 60, 900, 300])
PARAMS = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, detokenize=False)

Result = list[tuple[list[int], dict[int, list[int]]]]


def run(
    model: str,
    tensor_parallel_size: int,
    policy: str = "semantic",
    options: dict[str, Any] = OPTIONS,
    fails: bool = False,
) -> Result:
    """Tokens and evictions of each prompt."""
    with engine(
        model,
        policy=policy,
        kv_policy_config=options,
        tensor_parallel_size=tensor_parallel_size,
    ) as llm:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        assert executor.parallel_config.world_size == tensor_parallel_size
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert (take_fallbacks(llm) > 0) == fails
        return list(zip(tokens, llm.trace.by_index(), strict=True))


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers share the cores: without this vLLM wants a NUMA node for each.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "60")  # a rank that waits in vain


def test_two_ranks_are_one(llama: str) -> None:
    alone = run(llama, 1)
    assert all(evictions for _, evictions in alone[:1] + alone[2:])
    # A rank sees one of the model's two KV heads: its own scores choose other blocks.
    assert run(llama, 2) == alone


def test_a_policy_that_fails_on_one_rank(llama: str) -> None:
    """The other does not wait for it, and both know: the oldest blocks go."""
    by_age = run(llama, 1, "streaming", {"sink_tokens": 8, "recent_tokens": 192})
    budget = {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 128}
    assert run(llama, 2, "tests.faulty.OneRankFailsPolicy", budget, fails=True) == by_age


def test_ranks_reduce_scores_that_are_a_part_of_a_tensor(llama: str) -> None:
    """As SnapKV's are where a block is being filled, at the end of a prompt."""
    options = {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 128}
    assert len(PROMPTS[0]["prompt_token_ids"]) % 32
    alone = run(llama, 1, "snapkv", options)
    assert alone[0][1]
    assert run(llama, 2, "snapkv", options) == alone
