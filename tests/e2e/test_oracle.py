"""Over budget: what the engine evicts and says is what the oracle evicts and says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from vllm import SamplingParams

from .. import interpreter
from ..engines import engine, scheduler_of
from ..models import random_prompts
from ..oracle import Case, judge

POLICIES: dict[str, dict[str, Any]] = {
    "streaming": {"sink_tokens": 4, "recent_tokens": 128},
    "semantic": {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128},
}

STUDY = {**POLICIES["semantic"], "similarity": "study"}

RULES: dict[str, dict[str, Any]] = {
    "semantic, as in the study": STUDY,
} | {
    name: {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 128}
    for name in ("h2o", "tova", "snapkv", "paged_eviction", "knorm", "keydiff", "quest", "ucm")
}

# Float32 on both sides, two layers: the two differ in summation order alone. The bound is
# float32's unit roundoff times the number of sums behind a logit (width x layers x length).
TOLERANCE = 2**-24 * 256 * 2 * 16


@pytest.mark.parametrize(
    ("architecture", "block_size"),
    [("llama", 32), ("llama", 64), ("neox", 32), ("neox", 64), ("gemma", 32)],
)
def test_engine_agrees_with_oracle(
    architecture: str, block_size: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(architecture)
    prompts = random_prompts([600, 60, 900, 300])
    eviction_steps = assert_policies_agree(
        model, prompts, 280, block_size, hybrid=architecture == "gemma"
    )
    assert len(eviction_steps) > 4, "requests must evict in different steps"


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_the_field_agree_with_oracle(rule: str, llama: str) -> None:
    """Each rule evicts what its paper's formula says, from queries, keys, values, attention."""
    assert_policies_agree(llama, random_prompts([700, 330]), 150, 32, policies=(rule,))


def assert_policies_agree(
    model: str,
    prompts: list[Any],
    max_tokens: int,
    block_size: int,
    hybrid: bool = False,
    policies: Iterable[str] = POLICIES,
) -> set[frozenset[int]]:
    """Hold policies to the oracle.

    Returns:
        The steps at which requests evicted.
    """
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=1
    )
    cases: list[Case] = []
    traces: list[dict[int, list[int]]] = []
    answers: list[Any] = []
    for policy in policies:
        options = (POLICIES | RULES)[policy]
        name = policy.partition(",")[0]
        with engine(model, policy=name, kv_policy_config=options, block_size=block_size) as llm:
            assert_only_full_attention(llm, hybrid)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            traces += llm.trace.by_index()
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            answers.append(completion)
            cases.append(
                Case(
                    model=model,
                    token_ids=prompt["prompt_token_ids"] + list(completion.token_ids),
                    num_prompt_tokens=len(prompt["prompt_token_ids"]),
                    block_size=block_size,
                    prefill_interval=512,
                    eviction_delay=int(interpreter.wanted()),
                    **case_options(name, options),
                )
            )
    for case, trace, answer, verdict in zip(cases, traces, answers, judge(cases), strict=True):
        assert_agrees(case, trace, answer, verdict)
    return {frozenset(trace) for trace in traces if trace}


def case_options(policy: str, options: dict[str, Any]) -> dict[str, Any]:
    """A policy's options in the oracle's words."""
    words = {name.replace("semantic_", "selected_"): value for name, value in options.items()}
    similarity = words.pop("similarity", "attention")
    return {"rule": {"streaming": "age", "semantic": similarity}.get(policy, policy), **words}


def assert_only_full_attention(llm: Any, hybrid: bool) -> None:
    """The policy is on the full-attention groups and on no other."""
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    assert kinds == ({"SemanticSpec", "SlidingWindowSpec"} if hybrid else {"SemanticSpec"})


def assert_agrees(case: Case, trace: dict[int, list[int]], answer: Any, verdict: Any) -> None:
    assert trace, "nothing was evicted: the case shows nothing"
    total, delay = len(case.token_ids), case.eviction_delay
    shown = {at + delay: gone for at, gone in verdict.evictions.items() if at + delay < total}
    assert trace == shown
    for position, (logprobs, expected, greedy, gap) in enumerate(
        zip(answer.logprobs, verdict.logprobs, verdict.greedy, verdict.gaps, strict=True)
    ):
        token = answer.token_ids[position]
        assert logprobs[token].logprob == pytest.approx(expected, abs=TOLERANCE)
        assert token == greedy or gap < TOLERANCE, f"position {position}"
