"""Over budget: what the engine evicts and says is what the oracle evicts and says."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
from vllm import SamplingParams

from .. import interpreter
from ..engines import engine, reset_trace, scheduler_of
from ..models import random_prompts
from ..oracle import Case, Verdict, judge
from ..platforms import eviction_delay

POLICIES: dict[str, dict[str, Any]] = {
    "streaming": {"sink_tokens": 4, "recent_tokens": 128},
    "semantic": {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128},
}

STUDY = {**POLICIES["semantic"], "similarity": "study"}

RULES: dict[str, dict[str, Any]] = {
    "semantic, as in the study": STUDY,
    "semantic, by contribution to all heads": {**POLICIES["semantic"], "heads": "mean"},
    "semantic, by attention": {
        **POLICIES["semantic"],
        "similarity": "attention",
        "heads": "mean",
    },
} | {
    name: {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 128}
    for name in ("h2o", "tova", "snapkv", "paged_eviction", "knorm", "keydiff", "quest", "ucm")
}

GROUPS: dict[str, dict[str, Any]] = {
    "semantic, in 2 groups": POLICIES["semantic"] | {"layer_groups": 2},
    "semantic, in 2 groups, the first larger": POLICIES["semantic"]
    | {"layer_groups": 2, "layer_skew_tokens": -64, "similarity": "attention", "heads": "mean"},
}
"""Each half of the layers for itself."""

AT_QUESTIONS = {**POLICIES["semantic"], "recall_gib": 0.125}
RECALL: dict[str, dict[str, Any]] = {
    "semantic, recalled for the end of a prompt": AT_QUESTIONS,
    "semantic, recalled for the answer too": {
        **AT_QUESTIONS,
        "similarity": "attention",
        "heads": "mean",
        "recall_blocks": 2,
    },
    "semantic, recalled in 2 groups": {
        **AT_QUESTIONS,
        "recall_blocks": 1,
        "layer_groups": 2,
        "layer_skew_tokens": 32,
    },
    "h2o, recalled": {
        "sink_tokens": 8,
        "recent_tokens": 64,
        "selected_tokens": 128,
        "recall_gib": 0.125,
        "recall_blocks": 1,
    },
}
"""What was evicted comes back."""

OPTIONS = POLICIES | RULES | GROUPS | RECALL

OTHER_LAYERS = {
    "gemma": "SlidingWindowSpec",
    "gemma_of_six": "SlidingWindowSpec",
    "gpt_oss": "SlidingWindowSpec",
    "granite_hybrid": "MambaSpec",
}
"""What the layers without full attention keep."""

# Float32 on both sides, two layers: the two differ in summation order alone. The bound is
# float32's unit roundoff times the number of sums behind a logit (width x layers x length).
TOLERANCE = 2**-24 * 256 * 2 * 16


Run = tuple[Case, dict[int, list[Any]], Any]
"""What one request was, evicted and answered."""


@pytest.mark.parametrize(
    ("architecture", "block_size"),
    [("llama", 32), ("llama", 64), ("neox", 32), ("neox", 64), ("gemma", 32)],
)
def test_engine_agrees_with_oracle(
    architecture: str, block_size: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(architecture)
    # A short prompt that outgrows its budget; Triton's interpreter takes its time for each token.
    short, num_new = (240, 100) if interpreter.wanted() else (60, 280)
    prompts = random_prompts([600, short, 900, 300])
    runs: list[Run] = []
    for policy in POLICIES:
        with start(model, policy, block_size=block_size) as llm:
            assert_only_full_attention(llm, OTHER_LAYERS.get(architecture))
            runs += generate(llm, model, policy, prompts, num_new)
    assert_agree(runs)
    eviction_steps = {frozenset(trace) for _, trace, _ in runs if trace}
    assert len(eviction_steps) > 4, "requests must evict in different steps"


@pytest.mark.parametrize("architecture", ["gpt_oss", "granite_hybrid"])
def test_hybrid_models_agree_with_oracle(architecture: str, request: pytest.FixtureRequest) -> None:
    """Learned sinks beside the keys, Mamba states beside the blocks; with what comes back too."""
    model = request.getfixturevalue(architecture)
    for policy in ("semantic", next(iter(RECALL))):
        with start(model, policy) as llm:
            assert_only_full_attention(llm, OTHER_LAYERS[architecture])
            assert_agree(generate(llm, model, policy, random_prompts([700, 330]), 100))
            assert bool(llm.trace.recalls) == (policy in RECALL)


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_the_field_agree_with_oracle(rule: str, llama: str) -> None:
    """Each rule evicts what its paper's formula says, from queries, keys, values, attention."""
    with start(llama, rule) as llm:
        assert_agree(generate(llm, llama, rule, random_prompts([700, 330]), 150))


@pytest.mark.parametrize(
    ("architecture", "block_size"), [("llama", 32), ("neox", 64), ("gemma_of_six", 32)]
)
def test_groups_of_layers_agree_with_oracle(
    architecture: str, block_size: int, request: pytest.FixtureRequest
) -> None:
    """Half of the layers hold other blocks than the rest, also beside layers with a window."""
    model = request.getfixturevalue(architecture)
    runs: list[Run] = []
    # Where an engine takes minutes, the one with most to go wrong.
    for policy in list(GROUPS)[-1:] if interpreter.wanted() else GROUPS:
        with start(model, policy, block_size=block_size) as llm:
            assert_only_full_attention(llm, OTHER_LAYERS.get(architecture))
            assert len(scheduler_of(llm).kv_policy_managers) == 2
            runs += generate(llm, model, policy, random_prompts([600, 330]), 100)
    assert_agree(runs)
    for _, trace, _ in runs:
        assert any(first != second for first, second in trace.values()), trace


@pytest.mark.parametrize(
    ("architecture", "block_size"), [("llama", 32), ("neox", 64), ("gemma_of_six", 32)]
)
def test_recall_agrees_with_oracle(
    architecture: str, block_size: int, request: pytest.FixtureRequest
) -> None:
    """What comes back is what the oracle would have back, and it is what it was: every token after
    it, those of the prompt that read host memory included, is as likely as with it."""
    model = request.getfixturevalue(architecture)
    asked: list[tuple[int, int]] = []
    prompts, delay = random_prompts([600, 330, 1100]), eviction_delay()
    # All on one model; where an engine takes minutes, the one with most to go wrong.
    policies = list(RECALL) if architecture == "llama" else list(RECALL)[1:3]
    for policy in policies[2:3] if interpreter.wanted() else policies:
        with start(model, policy, block_size=block_size) as llm:
            of_policy = generate(llm, model, policy, prompts, 100, prompt_logprobs=0)
            recalls = [dict(llm.trace.recalls.get(r, {})) for r in sorted(llm.trace.evictions)]
        verdicts = assert_agree(of_policy)
        for (case, _, answer), verdict, recalled in zip(of_policy, verdicts, recalls, strict=True):
            assert recalled == shown(case, verdict.recalls), policy
            of_tokens = zip(answer.prompt_logprobs[1:], case.token_ids[1:], strict=False)
            said = [row[token].logprob for row, token in of_tokens]
            assert said == pytest.approx(verdict.prompt_logprobs, abs=TOLERANCE)
            asked += [(case.num_prompt_tokens, point - delay) for point in recalled]
    assert any(point == num_prompt for num_prompt, point in asked), "by no prompt"
    assert any(point > num_prompt for num_prompt, point in asked), "by no answer"


def test_chunk_sizes_agree_with_oracle(llama: str) -> None:
    """Whatever a step takes of a prompt: less than a budget, more, not whole blocks, all of it."""
    runs: list[Run] = []
    for chunk in (96, 1000, 2048):
        chunked = chunk < 2048
        with start(
            llama, "semantic", max_num_batched_tokens=chunk, enable_chunked_prefill=chunked
        ) as llm:
            runs += generate(llm, llama, "semantic", random_prompts([1100, 300]), 40)
    assert_agree(runs)


def test_prompt_logprobs_agree_with_oracle(llama: str) -> None:
    """A token of the prompt is as likely as what is left of the tokens before it makes it."""
    (prompt,) = random_prompts([1200])
    with start(llama, "semantic", enable_prefix_caching=True) as llm:
        runs = [
            run
            for _ in range(2)
            for run in generate(llm, llama, "semantic", [prompt], 2, prompt_logprobs=0)
        ]
    assert runs[0][1].keys() == {512, 1024, 1200}
    tokens = prompt["prompt_token_ids"]
    for (_, _, answer), verdict in zip(runs, assert_agree(runs), strict=True):
        of_tokens = zip(answer.prompt_logprobs[1:], tokens[1:], strict=True)
        said = [row[token].logprob for row, token in of_tokens]
        assert said == pytest.approx(verdict.prompt_logprobs, abs=TOLERANCE)


def start(model: str, policy: str, **engine_args: Any) -> AbstractContextManager[Any]:
    """An engine under one of the policies above."""
    options = OPTIONS[policy]
    name = policy.partition(",")[0]
    return engine(model, policy=name, kv_policy_config=options, **engine_args)


def generate(
    llm: Any, model: str, policy: str, prompts: list[Any], max_tokens: int, **params: Any
) -> list[Run]:
    """Serve prompts; each with what the oracle has to know of it."""
    config = llm.llm_engine.vllm_config
    reset_trace(llm)
    outputs = llm.generate(
        prompts,
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            **params,
        ),
        use_tqdm=False,
    )
    cases = [
        Case(
            model=model,
            token_ids=list(output.prompt_token_ids) + list(output.outputs[0].token_ids),
            num_prompt_tokens=len(output.prompt_token_ids),
            block_size=config.cache_config.block_size,
            prefill_interval=config.scheduler_config.max_num_batched_tokens,
            eviction_delay=eviction_delay(),
            **case_options(policy.partition(",")[0], OPTIONS[policy]),
        )
        for output in outputs
    ]
    return list(zip(cases, llm.trace.by_index(), outputs, strict=True))


def assert_agree(runs: list[Run]) -> list[Verdict]:
    """Hold requests to the oracle.

    Returns:
        What it says of each.
    """
    verdicts = judge([case for case, _, _ in runs])
    for (case, trace, output), verdict in zip(runs, verdicts, strict=True):
        assert_agrees(case, trace, output.outputs[0], verdict)
    return verdicts


def case_options(policy: str, options: dict[str, Any]) -> dict[str, Any]:
    """A policy's options in the oracle's words."""
    words = {name.replace("semantic_", "selected_"): value for name, value in options.items()}
    words["recall"] = bool(words.pop("recall_gib", 0))
    similarity, heads = words.pop("similarity", "contribution"), words.pop("heads", "max")
    similarity += ", max" * (heads == "max" and similarity != "study")
    return {"rule": {"streaming": "age", "semantic": similarity}.get(policy, policy), **words}


def assert_only_full_attention(llm: Any, other_layers: str | None) -> None:
    """The policy is on the full-attention groups and on no other."""
    groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    assert kinds == {"SemanticSpec"} | ({other_layers} if other_layers else set())


def shown(case: Case, at_points: dict[int, list[Any]]) -> dict[int, list[Any]]:
    """When a trace shows what should happen at eviction points."""
    total, delay = len(case.token_ids), case.eviction_delay
    settled = {at + delay: blocks for at, blocks in at_points.items()}
    return {at: blocks for at, blocks in settled.items() if at < total}


def assert_agrees(case: Case, trace: dict[int, list[Any]], answer: Any, verdict: Any) -> None:
    assert trace, "nothing was evicted: the case shows nothing"
    assert trace == shown(case, verdict.evictions)
    for position, (logprobs, expected, greedy, gap) in enumerate(
        zip(answer.logprobs, verdict.logprobs, verdict.greedy, verdict.gaps, strict=True)
    ):
        token = answer.token_ids[position]
        assert logprobs[token].logprob == pytest.approx(expected, abs=TOLERANCE)
        assert token == greedy or gap < TOLERANCE, f"position {position}"
