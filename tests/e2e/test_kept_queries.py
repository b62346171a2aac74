"""A step copies the queries that an eviction will look at, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_semantic.engine import worker
from vllm_semantic.ops.kernels import cpu_scoring
from vllm_semantic.ops.queries import Keep, keeper
from vllm_semantic.policies import SemanticPolicy

from ..engines import engine
from ..models import random_prompts
from ..platforms import on_gpu

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
NUM_ANSWERED = 100
BLOCK_SIZE = 32
NUM_LAYERS = 2


def test_queries_are_copied_only_before_an_eviction(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []

    def counting_keeper(rings: torch.Tensor) -> Keep:
        keep = keeper(rings)

        def counting(queries: torch.Tensor, places: torch.Tensor) -> None:
            copied.append(int(places[0, 0]))
            assert len(places) == 1 + copied[-1], "no graph: a launch is as wide as what it copies"
            keep(queries, places)

        return counting

    monkeypatch.setattr(worker, "keeper", counting_keeper)
    scored: list[bool] = []
    block_scores = cpu_scoring.block_scores

    def scoring(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        scores = block_scores(*args, **kwargs)
        scored.append(scores is not None)
        return scores

    monkeypatch.setattr(cpu_scoring, "block_scores", scoring)
    params = SamplingParams(max_tokens=NUM_ANSWERED, temperature=0, ignore_eos=True)
    policy = SemanticPolicy(**OPTIONS)
    window, budget = policy.num_queries, policy.budget(BLOCK_SIZE).total
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:

        def run(*lengths: int) -> list[int]:
            copied.clear()
            scored.clear()
            llm.generate(random_prompts(list(lengths)), params, use_tqdm=False)
            return list(copied)

        # Never over its budget: nothing is copied, nothing is launched.
        assert run(60, 90) == []
        # Over it from the prompt's end on, and then once a block.
        length = (budget + 2) * BLOCK_SIZE
        last_point = (length + NUM_ANSWERED - 1) // BLOCK_SIZE * BLOCK_SIZE
        num_points = (last_point - length) // BLOCK_SIZE + 1
        alone = run(length)
        # The kernel for CPUs answered: torch's operations did not have to.
        assert scored == ([] if on_gpu() else [True] * num_points)
        assert sum(alone) == NUM_LAYERS * window * num_points
        # The prompt's last queries in one step, then one in each step before a point.
        assert len(alone) == NUM_LAYERS * (1 + window * (num_points - 1))
        # Beside one that is near no point, no more is copied.
        assert sum(run(length, 60)) == sum(alone)
