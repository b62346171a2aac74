"""What a client may ask for and an operator may do, while blocks are evicted."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from ..engines import engine, manager_of, reset_trace, scheduler_of

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
BUDGET = 7 * 32
EXACT = 896
"""Tokens of a prompt of 900 in whole blocks: they are computed before its first eviction."""
SHAREABLE = 864
"""Of them, without the queries that decide about the eviction."""

Answer = tuple[tuple[int, ...], dict[int, list[int]]]


@pytest.fixture(scope="module")
def stock_hits(repo: Path) -> list[int]:
    with start(repo) as llm:
        return prefix_hits(llm, repo)


@pytest.fixture(scope="module")
def llm(stock_hits: list[int], repo: Path) -> Iterator[Any]:
    """An engine that shares prefixes, with few blocks to spare; one engine lives at a time."""
    with start(repo, policy="semantic", kv_policy_config=OPTIONS) as llm:
        yield llm


@pytest.fixture
def prompt(llm: Any, repo: Path) -> list[int]:
    """900 tokens of a book; nothing of it is cached yet."""
    assert llm.reset_prefix_cache()
    reset_trace(llm)
    return book(llm, repo, 900)


def start(repo: Path, **kwargs: Any) -> Any:
    return engine(
        str(repo / "models" / "lookback-5m"),
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        max_num_batched_tokens=1024,  # on CPUs vLLM takes no seed for a prompt in chunks
        num_gpu_blocks_override=120,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        **kwargs,
    )


def book(llm: Any, repo: Path, num_tokens: int, skip: int = 0) -> list[int]:
    text = sorted((repo / "benchmarks" / "texts" / "pg19").glob("*.txt"))[0].read_text()
    tokens: list[int] = llm.get_tokenizer().encode(text[: 20 * (skip + num_tokens)])
    return tokens[skip : skip + num_tokens]


def sampling(**kwargs: Any) -> SamplingParams:
    defaults = {"max_tokens": 100, "temperature": 0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**(defaults | kwargs))


def ask(llm: Any, tokens: list[int], params: SamplingParams | None = None) -> Any:
    return llm.generate({"prompt_token_ids": tokens}, params or sampling(), use_tqdm=False)[0]


def answers(llm: Any, tokens: list[int], params: SamplingParams | None = None) -> list[Answer]:
    """Tokens and evictions of every completion of one request."""
    reset_trace(llm)
    outputs = ask(llm, tokens, params).outputs
    evictions = llm.trace.evictions.values()  # in the order in which they were scheduled
    return [(tuple(o.token_ids), e) for o, e in zip(outputs, evictions, strict=True)]


def test_n_samples_are_n_requests(llm: Any, prompt: list[int]) -> None:
    """vLLM gives the i-th sample the i-th seed; each evicts for itself."""
    together = answers(llm, prompt, sampling(n=3, seed=7, temperature=1.0))
    alone = [answers(llm, prompt, sampling(seed=7 + i, temperature=1.0))[0] for i in range(3)]
    assert together == alone
    assert len({tokens for tokens, _ in together}) == 3
    assert all(len(evictions) > 3 for _, evictions in together)


@pytest.mark.parametrize("asked", [None, {"name": "streaming", "recent_tokens": 64}])
def test_beam_search_is_a_search_over_requests(asked: Any, llm: Any, repo: Path) -> None:
    """vLLM asks anew for every beam and token; by hand, one at a time, it is the same."""
    extra_args = asked and {"kv_policy": asked}
    prompt, width, length = book(llm, repo, 1100), 2, 6
    reset_trace(llm)
    params = BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True)
    params.extra_args = extra_args  # type: ignore[attr-defined]
    (found,) = llm.beam_search([{"prompt_token_ids": prompt}], params)
    assert all(llm.trace.evictions.values())
    scored = manager_of(llm).stats_by_policy["semantic"].scored_blocks
    beams = [(0.0, prompt)]
    for _ in range(length):
        candidates = []
        for total, tokens in beams:
            step = sampling(max_tokens=1, logprobs=2 * width, extra_args=extra_args)
            (row,) = ask(llm, tokens, step).outputs[0].logprobs
            candidates += [(total + lp.logprob, [*tokens, token]) for token, lp in row.items()]
        beams = heapq.nlargest(width, candidates, key=lambda beam: beam[0])
    assert [sequence.tokens for sequence in found.sequences] == [tokens for _, tokens in beams]
    more = manager_of(llm).stats_by_policy["semantic"].scored_blocks - scored
    assert bool(more) == (asked is None), "under the policy that was asked for"


def test_beams_of_a_grammar_have_the_policy_too(llm: Any, repo: Path) -> None:
    """vLLM builds their sampling parameters in another place."""
    grammar = StructuredOutputsParams(regex="(one|two)+")
    grammar._backend = "xgrammar"  # for beams, vLLM does not choose one itself
    params = BeamSearchParams(beam_width=2, max_tokens=3, structured_outputs=grammar)
    params.extra_args = {"kv_policy": {"name": "streaming", "recent_tokens": 64}}  # type: ignore[attr-defined]
    before = {name: stats.evicted_blocks for name, stats in manager_of(llm).stats_by_policy.items()}
    llm.beam_search([{"prompt_token_ids": book(llm, repo, 1100, skip=50)}], params)
    after = manager_of(llm).stats_by_policy
    assert after["streaming"].evicted_blocks > before.get("streaming", 0)
    assert after["semantic"].evicted_blocks == before.get("semantic", 0)


@pytest.mark.parametrize(
    "extra_args",
    [
        {"kv_policy_config": {"semantic_tokens": 32}},
        {"vllm_xargs": {"kv_policy": "full"}},
    ],
)
def test_a_policy_elsewhere_is_refused(extra_args: Any, llm: Any, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=r"kv_policy\w* is not read by extra_args; allowed: kv_p"):
        ask(llm, prompt, sampling(extra_args=extra_args))


def test_the_system_message_of_a_chat_is_pinned(llm: Any, repo: Path) -> None:
    """The same as pinning the tokens of its part of the prompt; each chat of a call for itself."""
    tokenizer = llm.get_tokenizer()
    system = {"role": "system", "content": tokenizer.decode(book(llm, repo, 110))}
    user = {"role": "user", "content": tokenizer.decode(book(llm, repo, 600, skip=200))}
    num_tokens = len(tokenizer.apply_chat_template([system], tokenize=True)["input_ids"])
    asked = [{"pin": "system"}, {"pin_prompt_tokens": num_tokens}, {}]
    asked = [{"semantic_tokens": 32, **each} for each in asked]  # the pin is of the budget
    reset_trace(llm)
    params = [sampling(extra_args={"kv_policy": each}) for each in asked]
    outputs = llm.chat([[system, user]] * 3, params, use_tqdm=False)
    answers = [tuple(output.outputs[0].token_ids) for output in outputs]
    pinned, same, unpinned = zip(answers, llm.trace.by_index(), strict=True)
    assert pinned == same
    first = [min(block for blocks in e.values() for block in blocks) for _, e in (same, unpinned)]
    assert first[0] >= num_tokens // 32 > first[1]
    with pytest.raises(ValueError, match=r"kv_policy.pin 'system' needs a chat"):
        llm.chat([user], params[0], use_tqdm=False)
    assert params[0].extra_args == {"kv_policy": asked[0]}, "the caller's own"


def test_prefix_hits_are_stocks_up_to_the_first_eviction(
    llm: Any, prompt: list[int], stock_hits: list[int], repo: Path
) -> None:
    """A prefix longer than the budget is shared; what was computed after an eviction never is."""
    assert stock_hits == [896, 448, 992, 0, 192, 128]
    # Of the prompt's own end, and of the first half's, the last queries decide.
    assert BUDGET < 416 < SHAREABLE < EXACT
    assert prefix_hits(llm, repo) == [SHAREABLE, 416, EXACT, 0, 192, 128]


def prefix_hits(llm: Any, repo: Path) -> list[int]:
    """Cached tokens of: a prompt again, its first half, its answer; and three within budget."""
    prompt, within = book(llm, repo, 900), book(llm, repo, 200, skip=1000)
    turn = ask(llm, prompt).outputs[0].token_ids
    asked = [prompt, prompt[:450], [*prompt, *turn, *prompt[:50]]]
    asked += [within, within, [*within[:150], *prompt[:40]]]
    return [ask(llm, tokens, sampling(max_tokens=8)).num_cached_tokens for tokens in asked]


def test_answers_do_not_depend_on_what_is_cached(llm: Any, prompt: list[int]) -> None:
    first = answers(llm, prompt)
    cached = ask(llm, prompt, sampling(max_tokens=1)).num_cached_tokens
    assert cached == SHAREABLE
    assert answers(llm, prompt) == first
    assert llm.reset_prefix_cache()
    assert ask(llm, prompt, sampling(max_tokens=1)).num_cached_tokens == 0
    assert answers(llm, prompt) == first


@pytest.mark.parametrize("level", [None, 0, 1, 2])
def test_a_pause_in_the_middle(level: int | None, llm: Any, prompt: list[int]) -> None:
    """The cache is reset, or the engine sleeps, while a request runs: it ends as it would have.

    On a CPU vLLM's sleep is that of the scheduler; memory stays where it is.
    """
    expected = answers(llm, prompt)
    reset_trace(llm)
    llm_engine = llm.llm_engine
    llm_engine.add_request("0", {"prompt_token_ids": prompt}, sampling())
    for _ in range(40):
        llm_engine.step()
    assert {900, 928} <= llm.trace.by_index()[0].keys(), "in decode, after evictions"
    if level is None:
        assert llm_engine.reset_prefix_cache(reset_running_requests=True)
    else:
        llm_engine.sleep(level, mode="keep")
        assert llm_engine.is_sleeping()
        assert not llm_engine.step()
        assert llm_engine.wake_up()
    if level != 0:
        (request,) = scheduler_of(llm).requests.values()
        assert request.num_computed_tokens == 0, "its blocks are gone"
    finished: list[Any] = []
    while llm_engine.has_unfinished_requests():
        finished += [output for output in llm_engine.step() if output.finished]
    (output,) = finished
    assert [(tuple(output.outputs[0].token_ids), llm.trace.by_index()[0])] == expected


def test_events_tell_what_is_cached(
    llm: Any, prompt: list[int], repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who follows the events knows the prefix cache: nothing approximate, nothing that is gone."""
    publisher = scheduler_of(llm).kv_event_publisher
    told: list[Any] = []
    monkeypatch.setattr(publisher, "publish", lambda batch: told.extend(batch.events))
    for i in range(6):  # more than the pool can remember
        last = book(llm, repo, 900, skip=1000 * i)
        last += ask(llm, last).outputs[0].token_ids
    kinds = {type(event) for event in told}
    assert kinds == {AllBlocksCleared, BlockStored, BlockRemoved}
    known: dict[Any, list[int]] = {}
    for event in told:
        match event:
            case BlockStored():
                for i, block_hash in enumerate(event.block_hashes):
                    known[block_hash] = event.token_ids[32 * i : 32 * i + 32]
            case BlockRemoved():
                for block_hash in event.block_hashes:
                    del known[block_hash]
            case AllBlocksCleared():
                known.clear()
    cache = scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block
    cached = {maybe_convert_block_hash(get_block_hash(key)) for key in cache._cache}
    assert known.keys() == cached
    blocks = [last[i : i + 32] for i in range(0, len(last), 32)]
    assert [block in known.values() for block in blocks] == [True] * 28 + [False] * 4
