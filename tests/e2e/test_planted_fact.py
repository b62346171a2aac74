"""A fact far back: similarity keeps it, age alone does not, at the same budget."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from ..engines import engine, manager_of
from ..models import FIRST_ANSWER, NUM_FACTS, fact_prompt, make_fact_finder

BUDGET = 264
POLICIES = {
    "full": {},
    "streaming": {"sink_tokens": 8, "recent_tokens": 256},
    "semantic": {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 192},
}


@pytest.fixture(scope="module")
def fact_finder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_fact_finder(tmp_path_factory.mktemp("fact-finder"))


@pytest.mark.parametrize("policy", POLICIES)
def test_planted_fact(policy: str, fact_finder: str) -> None:
    options = POLICIES[policy]
    if policy != "full":
        assert sum(options.values()) == BUDGET
    prompts = [fact_prompt(i, 100 + 150 * i, 1800) for i in range(NUM_FACTS)]
    # Long after the prompt, so that the fact has to survive decoding as well.
    params = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, detokenize=False)
    with engine(fact_finder, policy=policy, kv_policy_config=options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        evicted = manager_of(llm).stats.evicted_blocks
    expected = [FIRST_ANSWER + i for i in range(NUM_FACTS)]
    answers = [set(output.outputs[0].token_ids) for output in outputs]
    if policy == "streaming":
        assert all(answer.isdisjoint(expected) for answer in answers)
    else:
        assert answers == [{token} for token in expected]
    assert (evicted == 0) == (policy == "full")
