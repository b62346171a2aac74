"""The block managers alone, on vLLM's own pool: a scheduler that makes mistakes with scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_semantic.engine.kv_cache_manager import SemanticKVCacheManager
from vllm_semantic.engine.manager import SemanticManager
from vllm_semantic.engine.spec import SemanticSpec
from vllm_semantic.messages import ScoreRequest
from vllm_semantic.policies import KVPolicy, SemanticPolicy, StreamingPolicy
from vllm_semantic.policies.h2o import H2OPolicy
from vllm_semantic.policies.random import RandomPolicy
from vllm_semantic.served import ServedPolicies

from .lives import run_lives
from .paged import PrefixOfHash, Slot, Tokens, check_pool, check_pool_whole

BLOCK_SIZE = 4
MAX_MODEL_LEN = 80
MAX_REQUESTS = 5
MAX_IN_FLIGHT = 2

POLICIES: list[KVPolicy] = [
    StreamingPolicy(sink_tokens=4, recent_tokens=8),
    SemanticPolicy(sink_tokens=4, recent_tokens=8, semantic_tokens=8),
    SemanticPolicy(sink_tokens=0, recent_tokens=4, semantic_tokens=4),
    SemanticPolicy(sink_tokens=5, recent_tokens=7, semantic_tokens=13),
    H2OPolicy(sink_tokens=4, recent_tokens=8, selected_tokens=8),
    RandomPolicy(sink_tokens=4, recent_tokens=4, selected_tokens=12),
]


Asked = list[ScoreRequest]
"""One for each group of layers."""


@dataclass
class Life:
    """A request, and what is known of it that the manager is not told."""

    request: Request
    tokens: Tokens
    gone: list[set[int]]
    """Logical blocks evicted since the request last started over, by group of layers."""
    spans: list[tuple[int, Asked | None]] = field(default_factory=list)
    """Steps in flight, oldest first: tokens of each and what it was asked to score."""
    old_asks: list[Asked] = field(default_factory=list)
    """Score requests that were answered before, or never will be."""
    obedient: bool = True
    """Whether every chunk since the request last started over ended where it should."""

    @property
    def end(self) -> int:
        """Tokens computed once everything in flight has been."""
        return self.request.num_computed_tokens

    @property
    def processed(self) -> int:
        """Tokens of settled steps."""
        return self.request.num_computed_tokens - self.request.num_in_flight_tokens


class Requests(Mapping[str, Request]):
    """The lives as the scheduler's dict of requests."""

    def __init__(self, lives: Mapping[str, Life]) -> None:
        self.lives = lives

    def __getitem__(self, request_id: str) -> Request:
        return self.lives[request_id].request

    def __iter__(self) -> Iterator[str]:
        return iter(self.lives)

    def __len__(self) -> int:
        return len(self.lives)


class ManagerMachine(RuleBasedStateMachine):
    """Requests come, grow, are preempted and go; scores come late, twice, or not at all."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.policy = data.draw(st.sampled_from(POLICIES))
        self.interval = data.draw(st.sampled_from([8, 11, 16]))
        self.caching = data.draw(st.booleans())
        spec = SemanticSpec(
            block_size=BLOCK_SIZE,
            num_kv_heads=1,
            head_size=32,
            dtype=torch.float32,
            served=ServedPolicies(self.policy.name, self.policy),
            prefill_interval=self.interval,
            max_in_flight_tokens=MAX_IN_FLIGHT * self.interval,
        )
        self.max_admission_blocks = spec.max_admission_blocks
        self.groups = range(data.draw(st.sampled_from([1, 2])))
        num_blocks = len(self.groups) * data.draw(st.integers(12, 60))
        specs = [
            KVCacheGroupSpec([f"layer {i}"], replace(spec, layer_group=i)) for i in self.groups
        ]
        self.kv_cache_manager = SemanticKVCacheManager.take_over(
            KVCacheManager(
                KVCacheConfig(num_blocks, [], specs),
                max_model_len=MAX_MODEL_LEN,
                scheduler_block_size=BLOCK_SIZE,
                hash_block_size=BLOCK_SIZE,
                enable_caching=self.caching,
            )
        )
        self.pool = self.kv_cache_manager.block_pool
        self.managers = list(self.kv_cache_manager.coordinator.single_type_managers)
        self.manager = self.managers[0]
        init_none_hash(sha256)
        self.lives: dict[str, Life] = {}
        for manager in self.managers:
            assert type(manager) is SemanticManager
            manager.requests = Requests(self.lives)
            manager.is_first = manager is self.manager
        self.prompts: list[Tokens] = []
        self.cache: dict[int, dict[int, Slot]] = {}
        self.hashes = PrefixOfHash(BLOCK_SIZE, len(self.groups))

    def draw_life(self, data: st.DataObject, running: bool | None = None) -> Life:
        names = [
            name
            for name, life in self.lives.items()
            if running is None or running == (life.request.status == RequestStatus.RUNNING)
        ]
        return self.lives[data.draw(st.sampled_from(sorted(names)))]

    def _nothing(self) -> list[set[int]]:
        return [set() for _ in self.groups]

    def some(self, status: RequestStatus) -> bool:
        return any(life.request.status == status for life in self.lives.values())

    # -- requests come and go ----------------------------------------------------------

    @precondition(lambda self: len(self.lives) < MAX_REQUESTS)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        shared: list[int] = []
        if self.prompts and data.draw(st.booleans()):
            earlier = data.draw(st.sampled_from(self.prompts))
            shared = earlier.first(data.draw(st.integers(1, MAX_MODEL_LEN - 2)))
        length = data.draw(st.integers(max(1, len(shared)), MAX_MODEL_LEN - 1))
        seed = data.draw(st.integers(0, 20))
        tokens = Tokens(shared + [(seed * 31 + i) % 97 for i in range(length - len(shared))])
        name = f"r{len(self.prompts)}"
        self.prompts.append(tokens)
        params = SamplingParams(max_tokens=MAX_MODEL_LEN - length, ignore_eos=True)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if self.caching else None
        request = Request(name, tokens.prompt, params, None, block_hasher=hasher)
        self.lives[name] = Life(request, tokens, self._nothing())

    @precondition(lambda self: self.some(RequestStatus.RUNNING))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """As vLLM does: everything is freed, also what a step in flight still writes."""
        life = self.draw_life(data, running=True)
        self.kv_cache_manager.free(life.request)
        life.request.status = RequestStatus.PREEMPTED
        life.request.num_computed_tokens = 0
        # The scheduler waits for what is in flight, and ignores its scores.
        life.old_asks += [asked for _, asked in life.spans if asked]
        life.request.num_in_flight_tokens = 0
        life.spans, life.gone, life.obedient = [], self._nothing(), True
        self.seen["preempted"] += 1
        self.check()

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Finished or aborted, computed or not: the manager cannot tell."""
        life = self.draw_life(data)
        self.kv_cache_manager.free(life.request)
        del self.lives[life.request.request_id]
        self.check()

    @rule()
    def reset(self) -> None:
        """Only while nothing is held, which is when vLLM agrees to."""
        idle = not any(any(manager.req_to_blocks.values()) for manager in self.managers)
        assert self.kv_cache_manager.reset_prefix_cache() == idle
        if idle:
            assert not any(block.block_hash for block in self.pool.blocks)

    # -- steps -------------------------------------------------------------------------

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), obedient=st.booleans())
    def step(self, data: st.DataObject, obedient: bool) -> None:
        """Schedule one step of one request, with or without minding its eviction points."""
        life = self.draw_life(data)
        if len(life.spans) < MAX_IN_FLIGHT:
            self._step(life, data.draw(st.integers(1, self.interval)), obedient)

    @precondition(lambda self: self.lives)
    @rule(
        data=st.data(),
        num_steps=st.integers(2, 40),
        lag=st.integers(0, MAX_IN_FLIGHT - 1),
        answers=st.sampled_from([[True], [True], [False]]),
    )
    def run(self, data: st.DataObject, num_steps: int, lag: int, answers: list[bool]) -> None:
        """Many steps as a scheduler takes them, up to ``lag`` of them in flight."""
        life = self.draw_life(data)
        for _ in range(num_steps):
            if len(life.spans) < MAX_IN_FLIGHT and not self._step(life, self.interval, True):
                break
            while len(life.spans) > lag:
                self._settle(life, answers)

    def _step(self, life: Life, num_new: int, obedient: bool) -> bool:
        request, hit, num_hit = life.request, None, 0
        if request.status != RequestStatus.RUNNING:
            hit, num_hit, _ = self.kv_cache_manager.get_computed_blocks(request)
            limit = self.manager.max_prefix_hit_tokens(request)
            assert limit is not None
            num_hit = min(num_hit, limit)
            hit = self.kv_cache_manager.truncate_computed_blocks(hit, num_hit)
        start = request.num_computed_tokens + num_hit
        # With a step in flight, the token it will sample is a placeholder.
        known = request.num_tokens if start < request.num_tokens else start + 1
        num_new = min(num_new, known - start, MAX_MODEL_LEN - start)
        if num_new <= 0:
            return False
        life.obedient = life.obedient and obedient
        if obedient:
            num_new = self.manager.clip_to_eviction_point(request, start, num_new)
            assert num_new > 0
        before = [self._table(life, group) for group in self.groups]
        # The short way is for schedulers that settle a step before the next eviction.
        self.kv_cache_manager.forget(request.request_id)
        new_blocks = self.kv_cache_manager.allocate_slots(
            request, num_new, num_new_computed_tokens=num_hit, new_computed_blocks=hit
        )
        evicted = [m.take_evictions().pop(request.request_id, []) for m in self.managers]
        assert len({len(blocks) for blocks in evicted}) == 1, "all groups at once"
        for group in self.groups:
            self._check_evicted(life, group, before[group], evicted[group], num_hit)
        self.seen["evictions"] += bool(evicted[0])
        self.seen["groups that differ"] += any(blocks != evicted[0] for blocks in evicted)
        if new_blocks is None:
            self.seen["full pool"] += 1
            self.check()
            return False
        self.seen["hits"] += num_hit > 0
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = start + num_new
        request.num_in_flight_tokens += num_new
        self._write(life, start)
        asked: list[ScoreRequest | None] = [None for _ in self.groups]
        if self.policy.scores_blocks:
            asked = [m.score_request(request, request.num_computed_tokens) for m in self.managers]
            for group in self.groups:
                self._check_asked(life, group, asked[group])
        of_all = [of_group for of_group in asked if of_group is not None]
        assert len(of_all) in (0, len(asked)), "all groups at once"
        life.spans.append((num_new, of_all or None))
        self.seen["steps"] += 1
        self.check()
        return True

    @precondition(lambda self: any(life.spans for life in self.lives.values()))
    @rule(data=st.data(), answers=st.sampled_from([[True], [True, True], [False], [False, True]]))
    def settle(self, data: st.DataObject, answers: list[bool]) -> None:
        """The oldest step returns: with its scores, with them twice, without, or with old ones."""
        busy = sorted(name for name, life in self.lives.items() if life.spans)
        self._settle(self.lives[data.draw(st.sampled_from(busy))], answers)

    def _settle(self, life: Life, answers: list[bool]) -> None:
        num_tokens, asked = life.spans.pop(0)
        request = life.request
        request.num_in_flight_tokens -= num_tokens
        for fresh in answers if asked else []:
            if fresh:
                self._answer(life, asked)
            elif life.old_asks:
                self._answer(life, life.old_asks[-1])
        if asked:
            life.old_asks.append(asked)
        if life.processed >= request.num_tokens:
            request.append_output_token_ids(life.tokens[request.num_tokens])
        self.check()

    @precondition(lambda self: any(life.old_asks for life in self.lives.values()))
    @rule(data=st.data())
    def stale_scores(self, data: st.DataObject) -> None:
        """Scores of a step long gone, perhaps of a life before a preemption."""
        names = sorted(name for name, life in self.lives.items() if life.old_asks)
        life = self.lives[data.draw(st.sampled_from(names))]
        self._answer(life, data.draw(st.sampled_from(life.old_asks)))
        self.seen["stale scores"] += 1
        self.check()

    def _answer(self, life: Life, asked: Asked) -> None:
        for group, of_group in enumerate(asked):
            at = 1 + life.processed
            scores = [life.tokens.score(at, i, group) for i in of_group.block_indices]
            self.managers[group].record_scores(life.request.request_id, of_group, scores)

    # -- what must hold ----------------------------------------------------------------

    def _table(self, life: Life, group: int) -> list[int]:
        tables = self.managers[group].req_to_blocks
        return [b.block_id for b in tables.get(life.request.request_id, [])]

    def _check_evicted(
        self, life: Life, group: int, before: list[int], evicted: list[int], num_hit: int
    ) -> None:
        """Only full, settled blocks that were held; never the sink, never the recent ones."""
        num_full = (life.processed + num_hit) // BLOCK_SIZE
        gone = life.gone[group]
        kept = [i for i in range(num_full) if i not in gone]
        budget = self.policy.budget(BLOCK_SIZE)
        assert evicted == sorted(set(evicted))
        assert set(evicted) <= set(budget.candidates(kept))
        assert not evicted or len(kept) - len(evicted) == budget.total, "not one too many"
        gone |= set(evicted)
        table = self._table(life, group)
        for i, block_id in enumerate(before):
            assert table[i] == (0 if i in gone else block_id), "a kept block moved"
        if evicted:
            state = self.managers[group]._requests[life.request.request_id]
            assert state.kept == [i for i in kept if i not in gone]

    def _write(self, life: Life, start: int) -> None:
        """What the step will leave in the cache: exact only if it sees every block."""
        gone = frozenset((group, block) for group in self.groups for block in life.gone[group])
        for group in self.groups:
            table = self._table(life, group)
            for position in range(start, life.request.num_computed_tokens):
                block_id = table[position // BLOCK_SIZE]
                assert block_id != 0
                slots = self.cache.setdefault(block_id, {})
                prefix = life.tokens.prefix(position)
                slots[position % BLOCK_SIZE] = Slot(prefix, gone, not gone, group)

    def _check_asked(self, life: Life, group: int, asked: ScoreRequest | None) -> None:
        if asked is None:
            return
        table = self._table(life, group)
        kept = [i for i, b in enumerate(table) if b and (i + 1) * BLOCK_SIZE <= life.end]
        assert asked.block_indices == kept
        filling = [life.end // BLOCK_SIZE] if life.end % BLOCK_SIZE else []
        assert asked.block_ids == [table[i] for i in kept + filling]

    def check(self) -> None:
        every = enumerate(manager.req_to_blocks for manager in self.managers)
        check_pool(self.pool, {(i, name): of[name] for i, of in every for name in of})
        for life in self.lives.values():
            self.hashes.learn(life.request, life.tokens)
        for group in self.groups:
            self._check_group(group)
        self.seen["shared"] += self.hashes.check_cached_blocks(self.pool, self.cache)

    def _check_group(self, group: int) -> None:
        manager = self.managers[group]
        tables = dict(manager.req_to_blocks)
        assert not manager._evictions, "evictions that no step has told"
        assert manager._requests.keys() <= tables.keys()
        recovered = sum(block.is_null for table in tables.values() for block in table)
        assert manager.stats.recovered_blocks == recovered
        for name, state in manager._requests.items():
            assert state.kept == sorted(set(state.kept))
            assert not set(state.kept) & self.lives[name].gone[group]
        for name, life in self.lives.items():
            table = tables.get(name, [])
            held = [i for i, block in enumerate(table) if not block.is_null]
            assert {i for i, block in enumerate(table) if block.is_null} == life.gone[group]
            # Also where scores never came.
            assert not life.obedient or len(held) <= self.max_admission_blocks
            for i in held:
                # Nobody else has written into a block that is held.
                for offset in range(min(BLOCK_SIZE, life.end - i * BLOCK_SIZE)):
                    slot = self.cache[table[i].block_id][offset]
                    prefix = life.tokens.prefix(i * BLOCK_SIZE + offset)
                    assert (slot.prefix, slot.group) == (prefix, group)

    def teardown(self) -> None:
        if not hasattr(self, "kv_cache_manager"):
            return
        self.seen["fallbacks"] += sum(manager.stats.fallbacks for manager in self.managers)
        for life in self.lives.values():
            self.kv_cache_manager.free(life.request)
        for manager in self.managers:
            check_pool_whole(manager)


def test_manager() -> None:
    seen: Counter[str] = Counter()
    run_lives(partial(ManagerMachine, seen), 400)
    least = {
        "steps": 5000,
        "evictions": 500,
        "groups that differ": 50,
        "hits": 100,
        "preempted": 100,
        "full pool": 20,
        "stale scores": 50,
        "shared": 1000,
        "fallbacks": 50,
    }
    assert all(seen[what] >= n for what, n in least.items()), seen
