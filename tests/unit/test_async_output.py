"""Scores of an asynchronous step arrive with its tokens."""

from __future__ import annotations

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_semantic.engine.scorer import PendingScores
from vllm_semantic.engine.worker import ScoredAsyncOutput
from vllm_semantic.messages import ScoreRequest, scores_of
from vllm_semantic.policies import SemanticPolicy


class SlowOutput(AsyncModelRunnerOutput):
    """As a runner returns it: ready when it is collected, and only once."""

    def __init__(self) -> None:
        self.num_collected = 0

    def get_output(self) -> ModelRunnerOutput:
        self.num_collected += 1
        return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[5]])


def test_collecting_waits_once_and_brings_the_scores() -> None:
    slow = SlowOutput()
    asked = {0: {"a": ScoreRequest(SemanticPolicy(), 64, [1, 2], [7, 8])}}
    pending = PendingScores(asked, {0: torch.tensor([0.5, 0.25])}, copy_stream=None)
    scored = ScoredAsyncOutput(slow, pending)
    assert isinstance(scored, AsyncModelRunnerOutput)
    assert slow.num_collected == 0, "a step must not be waited for before it is asked for"
    output = scored.get_output()
    assert slow.num_collected == 1
    assert output == SlowOutput().get_output()
    assert scores_of(output) == {0: {"a": [0.5, 0.25]}}
