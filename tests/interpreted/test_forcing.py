"""Teacher forcing on Model Runner V2: its trace replay gives the oracle's likelihoods."""

from __future__ import annotations

import pytest

from benchmarks.forcing import forced_params, forcing_options

from ..e2e.test_oracle import TOLERANCE
from ..engines import engine
from ..models import random_prompts
from ..oracle import Case, judge


def test_forced_text(llama: str) -> None:
    (prompt,) = random_prompts([300])
    tokens = prompt["prompt_token_ids"]
    options = {"sink_tokens": 4, "recent_tokens": 64}
    with engine(llama, policy="streaming", kv_policy_config=options, **forcing_options()) as llm:
        (output,) = llm.generate(
            [{"prompt_token_ids": tokens[:250]}], forced_params(tokens[250:]), use_tqdm=False
        )
    completion = output.outputs[0]
    assert list(completion.token_ids) == tokens[250:]
    (verdict,) = judge([Case(llama, tokens, 250, 32, 512, **options, eviction_delay=1)])
    assert verdict.evictions
    logprobs = [row[t].logprob for t, row in zip(tokens[250:], completion.logprobs, strict=True)]
    assert logprobs == pytest.approx(verdict.logprobs, abs=TOLERANCE)
