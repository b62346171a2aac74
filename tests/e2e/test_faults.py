"""Policies that fail, answers that get lost, requests that go in mid-step: who else notices?

Where a policy has no answer the oldest blocks go. So a request whose policy always fails does
what StreamingLLM does with the same budget, token by token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_semantic.engine import explain
from vllm_semantic.messages import step_of
from vllm_semantic.policies import BlockView
from vllm_semantic.policies.oracle import FUTURE_ATTENTION

from ..engines import (
    assert_pool_whole,
    engine,
    manager_of,
    request_number,
    reset_trace,
    scheduler_of,
    take_fallbacks,
    worker_of,
)
from ..faulty import SpoiltPolicy
from ..models import random_prompts

BLOCK_SIZE = 32
BUDGET = {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 128}
SAME_BY_AGE = {"sink_tokens": 8, "recent_tokens": 192}
LENGTHS = [1900, 40, 900, 513]
PROMPTS = random_prompts(LENGTHS)
PARAMS = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, detokenize=False)
POOL_BLOCKS = 56  # fewer than the first prompt has

Result = list[tuple[list[int], dict[int, list[int]]]]


def run(llm: Any, prompts: list[Any], params: Any = PARAMS) -> Result:
    """Tokens and evictions of each prompt; nobody held more than admission allows."""
    reset_trace(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    allowed = manager_of(llm).kv_cache_spec.max_admission_blocks
    assert max(llm.trace.max_held.values()) <= allowed < POOL_BLOCKS
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


def small_engine(model: str, policy: str, options: dict[str, int], **kwargs: Any) -> Any:
    return engine(
        model,
        policy=policy,
        kv_policy_config=options,
        num_gpu_blocks_override=POOL_BLOCKS,
        **kwargs,
    )


@pytest.fixture(scope="module")
def by_age(llama: str) -> Result:
    with small_engine(llama, "streaming", SAME_BY_AGE) as llm:
        return run(llm, PROMPTS)


@pytest.fixture(scope="module")
def llm(llama: str, by_age: Result) -> Iterator[Any]:
    """Of the policy whose scores the tests spoil."""
    with small_engine(llama, "tests.faulty.SpoiltPolicy", BUDGET) as llm:
        yield llm


@pytest.fixture(scope="module")
def unspoilt(llm: Any) -> Result:
    return run(llm, PROMPTS)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    return lambda how: monkeypatch.setattr(SpoiltPolicy, "spoil", staticmethod(how))


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What vLLM logs as an error in this process, tracebacks included."""
    found: list[str] = []
    formatter = logging.Formatter()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(formatter.format(record))  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    yield found
    logging.getLogger("vllm").removeHandler(handler)


# -- scores ----------------------------------------------------------------------------


def raising(view: BlockView, scores: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("a bug in a policy")


def exiting(view: BlockView, scores: torch.Tensor) -> torch.Tensor:
    raise SystemExit("a bug in a policy")


NO_SCORES: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, "a bug in a policy"),
    "exits": (exiting, "a bug in a policy"),
    "all NaN": (lambda view, scores: scores * float("nan"), "every score is NaN"),
    "too few": (lambda view, scores: scores[:, 1:], "the scores have the shape"),
    "too many": (lambda view, scores: scores.repeat(1, 2), "the scores have the shape"),
    "no layers": (lambda view, scores: scores[0], "the scores have the shape"),
    "a list": (lambda view, scores: scores.tolist(), "the scores are a list"),
    "complex": (lambda view, scores: scores * 1j, "dense real numbers"),
    "elsewhere": (lambda view, scores: scores.to("meta"), "the scores are on meta"),
    "nothing": (lambda view, scores: None, "the scores are a NoneType"),
}


@pytest.mark.parametrize("fault", NO_SCORES)
def test_without_scores_the_oldest_go(
    fault: str,
    llm: Any,
    by_age: Result,
    spoil: Callable[..., None],
    errors: list[str],
) -> None:
    how, message = NO_SCORES[fault]
    spoil(how)
    assert run(llm, PROMPTS) == by_age
    assert take_fallbacks(llm) == sum(len(evictions) for _, evictions in by_age)
    assert any(message in error for error in errors)
    chosen = [error for error in errors if "KV policy spoilt cannot choose" in error]
    # Once a request, however often it happens to it.
    requests = sorted(error.partition("of request ")[2].split()[0] for error in chosen)
    assert requests == sorted(name for name, evicted in llm.trace.evictions.items() if evicted)


def test_it_is_over_when_the_fault_is(llm: Any, unspoilt: Result) -> None:
    assert run(llm, PROMPTS) == unspoilt


def test_one_request_fails_alone(
    llm: Any, unspoilt: Result, spoil: Callable[..., None], errors: list[str]
) -> None:
    """Its neighbours in the batch do not notice, and what it does is not a matter of luck."""

    def only_the_third(view: BlockView, scores: torch.Tensor) -> torch.Tensor:
        if view.num_tokens == LENGTHS[2]:
            raise RuntimeError("a bug at this length")
        return scores

    spoil(only_the_third)
    together = run(llm, PROMPTS)
    assert take_fallbacks(llm) == 1
    assert [together[i] for i in (0, 1, 3)] == [unspoilt[i] for i in (0, 1, 3)]
    assert together[2] != unspoilt[2]
    assert run(llm, PROMPTS[2:3]) == together[2:3]
    assert take_fallbacks(llm) == 1
    assert sum("a bug at this length" in error for error in errors) == 2


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_score_that_is_not_finite_counts_once(
    value: str, llm: Any, unspoilt: Result, spoil: Callable[..., None]
) -> None:
    """It keeps or loses its block where it is given, and leaves nothing to the points after."""
    first, block = min(unspoilt[0][1]), 3

    def spoilt(view: BlockView, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        worst_or_best = float(value) if view.num_tokens == first else float("-1e9")
        scores[:, view.block_indices[: view.num_full_blocks] == block] = worst_or_best
        return scores

    spoil(spoilt)
    ((_, evictions),) = run(llm, PROMPTS[:1])
    assert take_fallbacks(llm) == 0
    gone = [at for at, blocks in evictions.items() if block in blocks]
    second = sorted(evictions)[1]
    assert gone == [second if value == "inf" else first]
    assert [len(blocks) for blocks in evictions.values()] == [
        len(blocks) for blocks in unspoilt[0][1].values()
    ]


def test_lost_scores(
    llm: Any, by_age: Result, monkeypatch: pytest.MonkeyPatch, errors: list[str]
) -> None:
    """Steps come back without them: nobody waits, and nobody grows."""
    worker = worker_of(llm)
    sample = worker.sample_tokens

    def without_scores(*args: Any) -> Any:
        worker._scores = None
        return sample(*args)

    monkeypatch.setattr(worker, "sample_tokens", without_scores)
    assert run(llm, PROMPTS) == by_age
    assert take_fallbacks(llm) == sum(len(evictions) for _, evictions in by_age)
    assert any("no scores came from the workers" in error for error in errors)


def test_abort_while_the_step_runs(
    llm: Any, unspoilt: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was asked to score the request, and its scores come after its end."""
    llm_engine = llm.llm_engine
    executor = llm_engine.engine_core.engine_core.model_executor
    execute, at, aborted = executor.execute_model, sorted(unspoilt[0][1])[-2], []

    def aborting(scheduler_output: Any, **kwargs: Any) -> Any:
        output = execute(scheduler_output, **kwargs)
        for request_id, request in list(scheduler_of(llm).requests.items()):
            if request_number(request_id) == 0 and request.num_computed_tokens == at:
                llm_engine.abort_request(["0"])
                aborted.append(step_of(scheduler_output).score_requests[0][request_id])
        return output

    monkeypatch.setattr(executor, "execute_model", aborting)
    for i, prompt in enumerate(PROMPTS):
        llm_engine.add_request(str(i), prompt, PARAMS)
    tokens = {}
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert [asked.num_tokens for asked in aborted] == [at]
    assert [tokens[str(i)] for i in (1, 2, 3)] == [tokens for tokens, _ in unspoilt[1:]]
    assert_pool_whole(llm)


def test_a_policy_that_never_scores_is_refused_at_start(llama: str, errors: list[str]) -> None:
    with (
        pytest.raises(RuntimeError, match="--kv-policy never_scores cannot score"),
        small_engine(llama, "tests.faulty.NeverScoresPolicy", BUDGET),
    ):
        pass
    assert any("not even once" in error for error in errors)


# -- ranks, on the scheduler's side ----------------------------------------------------


@pytest.mark.parametrize(
    "future",
    [
        "nonsense",
        {"512": "nonsense"},
        {"512": [1.0]},
        {"512": [None, 1.0] * 32},
        {"512": [[i % 2, i] for i in range(64)]},
        {"512": {"0": 1.0}},
    ],
    ids=repr,
)
def test_what_a_client_sends_to_a_ranking_policy(
    future: Any,
    oracle: Any,
    by_age: Result,
    errors: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One request with nonsense among others: it falls back, they do not notice.

    Not even where every eviction is explained in the log.
    """
    monkeypatch.setattr(explain.logger, "level", logging.DEBUG)
    spoilt = PARAMS.clone()
    spoilt.extra_args = {FUTURE_ATTENTION: future}
    # Without a future the oracle goes by age, and so does one that fails.
    assert run(oracle, PROMPTS, [spoilt, PARAMS, PARAMS, PARAMS]) == by_age
    assert take_fallbacks(oracle) >= 1
    (error,) = errors
    assert "KV policy oracle cannot choose among the blocks of request" in error


@pytest.fixture(scope="module")
def oracle(llama: str) -> Iterator[Any]:
    with small_engine(llama, "oracle", BUDGET) as llm:
        yield llm
