"""A step copies the queries that an eviction will look at, and no other."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from vllm_semantic.engine import backend
from vllm_semantic.policies import SemanticPolicy

from ..engines import engine
from ..models import random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
NUM_ANSWERED = 100
BLOCK_SIZE = 32
NUM_LAYERS = 2


def test_queries_are_copied_only_before_an_eviction(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_queries, copied = backend.keep_queries, []

    def counting(rings: torch.Tensor, queries: torch.Tensor, places: torch.Tensor) -> None:
        copied.append(int(places[0, 0]))
        assert len(places) == 1 + copied[-1], "no graph: a launch is as wide as what it copies"
        keep_queries(rings, queries, places)

    monkeypatch.setattr(backend, "keep_queries", counting)
    params = SamplingParams(max_tokens=NUM_ANSWERED, temperature=0, ignore_eos=True)
    policy = SemanticPolicy(**OPTIONS)
    window, budget = policy.num_queries, policy.budget(BLOCK_SIZE).total
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:

        def run(*lengths: int) -> list[int]:
            copied.clear()
            llm.generate(random_prompts(list(lengths)), params, use_tqdm=False)
            return list(copied)

        # Never over its budget: nothing is copied, nothing is launched.
        assert run(60, 90) == []
        # Over it from the prompt's end on, and then once a block.
        length = (budget + 2) * BLOCK_SIZE
        last_point = (length + NUM_ANSWERED - 1) // BLOCK_SIZE * BLOCK_SIZE
        num_points = (last_point - length) // BLOCK_SIZE + 1
        alone = run(length)
        assert sum(alone) == NUM_LAYERS * window * num_points
        # The prompt's last queries in one step, then one in each step before a point.
        assert len(alone) == NUM_LAYERS * (1 + window * (num_points - 1))
        # Beside one that is near no point, no more is copied.
        assert sum(run(length, 60)) == sum(alone)
