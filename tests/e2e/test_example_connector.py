"""vLLM's example connector under a policy: prompts that one step computes go to disk and come
back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from ..engines import engine, reset_trace
from ..models import random_prompts

POLICY: dict[str, Any] = {
    "policy": "semantic",
    "kv_policy_config": {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 64},
}
PROMPTS = random_prompts([130, 300, 600])
"""Within the budget; over it at its end; over it in its midst, where a step ends."""
PARAMS = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True, detokenize=False)


def connector(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


@pytest.fixture(scope="module")
def alone(llama: str) -> list[Any]:
    """What comes of the prompts without a connector."""
    with engine(llama, **POLICY) as llm:
        results, _ = run(llm)
    assert [bool(evicted) for _, evicted in results] == [True, True, True]
    return results


def run(llm: Any) -> tuple[list[Any], list[int]]:
    """Tokens and evictions of each prompt, and what it found computed."""
    reset_trace(llm)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    results = [
        (output.outputs[0].token_ids, evicted)
        for output, evicted in zip(outputs, llm.trace.by_index(), strict=True)
    ]
    return results, [output.num_cached_tokens for output in outputs]


def test_whole_prompts_travel(alone: list[Any], llama: str, tmp_path: Path) -> None:
    with engine(llama, kv_transfer_config=connector(tmp_path), **POLICY) as llm:
        assert run(llm) == (alone, [0, 0, 0])
        stored = list(tmp_path.iterdir())
        assert len(stored) == 2, "a prompt of two steps was stored, or one of one step was not"
        assert run(llm) == (alone, [128, 288, 0])
        assert [*tmp_path.iterdir()] == stored


def test_a_prompt_whose_first_eviction_needs_its_queries_is_computed(
    alone: list[Any], llama: str, tmp_path: Path
) -> None:
    """What another engine, without a policy, has stored is too much of it."""
    config = connector(tmp_path)
    with engine(llama, kv_transfer_config=config, max_num_batched_tokens=1024) as llm:
        run(llm)
    assert len([*tmp_path.iterdir()]) == 3
    with engine(llama, kv_transfer_config=config, **POLICY) as llm:
        assert run(llm) == (alone, [128, 288, 0])
