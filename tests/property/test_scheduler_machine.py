"""vLLM's schedulers under a policy, driven without a model through random lives of requests."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from benchmarks.host import make_scheduler
from vllm_semantic import register
from vllm_semantic.engine.manager import NoRoomError
from vllm_semantic.engine.query_windows import num_drafts_in_flight
from vllm_semantic.engine.spec import semantic_spec
from vllm_semantic.messages import KVPolicyStep, Owner, scores_of, step_of
from vllm_semantic.served import REQUEST_KEY, ServedPolicies
from vllm_semantic.upstream.hooks import SCHEDULERS

from .lives import run_lives
from .paged import (
    MAX_DRAFTS,
    VOCAB_SIZE,
    ExpectedRequest,
    PagedWorker,
    PrefixOfHash,
    Tokens,
    check_host_pool,
    check_pool,
    check_pool_whole,
)

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
MAX_REQUESTS = 5
QUESTION_TOKENS = 13

TIGHT = [
    {"name": "streaming", "sink_tokens": 4, "recent_tokens": 8},
    {"name": "streaming", "sink_tokens": 0, "recent_tokens": 4},
    {"name": "semantic", "sink_tokens": 4, "recent_tokens": 8, "semantic_tokens": 12},
    {"name": "semantic", "sink_tokens": 0, "recent_tokens": 4, "semantic_tokens": 4},
    {"name": "semantic", "sink_tokens": 9, "recent_tokens": 4, "semantic_tokens": 20},
    {"name": "h2o", "sink_tokens": 4, "recent_tokens": 8, "selected_tokens": 12},
]
ASKED = [
    None,
    {"pin_prompt_tokens": 16},
    {"name": "full"},
    {"name": "streaming", "sink_tokens": 4, "recent_tokens": 4},
    {"name": "semantic", "sink_tokens": 0, "recent_tokens": 8, "semantic_tokens": 16},
    {"name": "semantic", "semantic_tokens": 4, "recent_tokens": 4, "similarity": "study"},
]
"""What requests ask for; where that is too much, they run under the server's policy."""
MAX_REQUEST_TOKENS = 48

HOST = [(0, 0), (4096, 0), (4096, 1), (4096, 3), (MAX_REQUESTS, 2)]
"""Slots of host memory, and blocks that come back at a point of an answer."""

AMPLE = [
    {"name": "full"},
    {"name": "streaming", "recent_tokens": 4096},
    {"name": "semantic", "semantic_tokens": 4096},
]


NGRAM = {"method": "ngram", "prompt_lookup_max": 1}


@cache
def make_config(
    model: str,
    asynchronous: bool,
    tokens_per_step: int,
    long_prompt: int,
    caching: bool,
    num_drafts: int,
) -> Any:
    register()
    config = EngineArgs(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_REQUESTS - 1,
        max_num_batched_tokens=tokens_per_step,
        block_size=32,
        long_prefill_token_threshold=long_prompt,
        enable_prefix_caching=caching,
        speculative_config=NGRAM | {"num_speculative_tokens": num_drafts} if num_drafts else None,
    ).create_engine_config()
    # The CPU platform turns it off: what a GPU would have.
    config.scheduler_config.async_scheduling = asynchronous
    return config


class SchedulerMachine(RuleBasedStateMachine):
    """An engine whose worker is exact and whose users are not."""

    def __init__(
        self, model: str, asynchronous: bool, policies: list[dict[str, Any]], seen: Counter[str]
    ) -> None:
        super().__init__()
        self.seen = seen
        self.model = model
        self.asynchronous = asynchronous
        self.policies = policies
        self.max_in_flight = 2 if asynchronous else 1

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        config = data.draw(st.sampled_from(self.policies))
        if self.policies is TIGHT:
            config = config | {"max_request_tokens": MAX_REQUEST_TOKENS}
        self.groups = range(data.draw(st.sampled_from([1, 2])))
        skewed = self.policies is TIGHT and len(self.groups) > 1
        selected = config.get("semantic_tokens", 0) if skewed else 0
        skew = data.draw(st.sampled_from([0, selected, -selected, BLOCK_SIZE * (selected > 0)]))
        self.num_slots, recall_blocks = data.draw(st.sampled_from(HOST))
        self.forgets = self.num_slots == MAX_REQUESTS
        """Whether host memory is so small that blocks are lost."""
        self.served = replace(
            ServedPolicies.from_config(
                config | {"layer_groups": len(self.groups), "layer_skew_tokens": skew}
            ),
            recall_blocks=recall_blocks,
        )
        self.tokens_per_step = data.draw(st.sampled_from([8, 13, 16, 32]))
        self.caching = data.draw(st.booleans())
        # With one, two steps in flight fit between two eviction points.
        drafts = [0, 1, MAX_DRAFTS] if self.policies is TIGHT else [0]
        self.num_drafts = data.draw(st.sampled_from(drafts))
        vllm_config = make_config(
            self.model,
            self.asynchronous,
            self.tokens_per_step,
            data.draw(st.sampled_from([0, 5])),
            self.caching,
            self.num_drafts,
        )
        full = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        # A model that drafts writes behind what has been computed.
        self.num_ahead = data.draw(st.sampled_from([0, 3])) if self.num_drafts else 0
        specs = [
            semantic_spec(full, self.served, vllm_config, group, self.num_slots)
            for group in self.groups
        ]
        num_in_flight = specs[0].max_in_flight_tokens + self.num_ahead
        specs = [replace(spec, max_in_flight_tokens=num_in_flight) for spec in specs]
        self.spec = specs[0]
        most = -(-MAX_MODEL_LEN // BLOCK_SIZE)
        # What vLLM's start-up check asks for is enough; more is drawn.
        least = [min(spec.max_admission_blocks or most, most) for spec in specs]
        num_blocks = sum(least) + data.draw(st.integers(1, most))
        ours = resolve_obj_by_qualname(SCHEDULERS[self.asynchronous])
        self.scheduler = make_scheduler(ours, vllm_config, specs, num_blocks)
        self.scheduler.num_lookahead_tokens = self.num_ahead
        # To Model Runner V2 a request that was preempted is new.
        self.scheduler.use_v2_model_runner = self.asynchronous and data.draw(st.booleans())
        self.managers = self.scheduler.kv_policy_managers
        for group, manager in self.managers.items():
            manager._evict_at = partial(self.record, group, manager._evict_at)
            manager._with_room = partial(self.make_room, manager._with_room)
            manager.question_tokens = QUESTION_TOKENS
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.stock = None
        if self.policies is AMPLE:
            stock = AsyncScheduler if self.asynchronous else Scheduler
            self.stock = make_scheduler(stock, vllm_config, [full for _ in specs], num_blocks)
            self.stock.use_v2_model_runner = self.scheduler.use_v2_model_runner
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256) if self.caching else None
        self.worker = PagedWorker(
            BLOCK_SIZE,
            self.served.num_queries,
            MAX_REQUESTS,
            max(least),
            len(self.groups),
            num_drafts_in_flight(vllm_config),
        )
        self.hashes = PrefixOfHash(BLOCK_SIZE, len(self.groups))
        self.in_flight: deque[tuple[Any, Any, Any, dict[str, int]]] = deque()
        """Of each step: what was scheduled, by stock too, what came, and how many drafts of which
        requests were wrong."""
        self.tokens: dict[str, Tokens] = {}
        self.requests: dict[str, Request] = {}
        self.expected: dict[str, ExpectedRequest] = {}
        self.session: str | None = None
        """One at a time: what waits for its user cannot be preempted, and two that hold blocks
        would wait for each other's, in vLLM alone too."""
        self.hung_up = False
        """Whether the session's user has said the last word."""
        self.room = 0
        """Tokens that the session may still get, prompts and answers."""
        self.session_args: dict[str, Any] | None = None
        self.update_session = self.scheduler._update_request_as_session
        self.scheduler._update_request_as_session = self.follow_session
        self.evicted: dict[str, list[dict[int, list[int]]]] = {}
        """Of each request since it last started over, in each group: computed tokens -> logical
        blocks."""
        self.preempted: set[str] = set()
        """Requests that have not gone on since."""
        self.curtailed: set[str] = set()
        """Requests that could not recall all that they wanted."""
        self.recalled: dict[str, list[dict[int, list[int]]]] = {}
        """The same of what came back."""

    # -- what users do -----------------------------------------------------------------

    @precondition(lambda self: len(self.scheduler.requests) < MAX_REQUESTS)
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        shared: list[int] = []
        if self.tokens and data.draw(st.booleans()):
            earlier = self.tokens[data.draw(st.sampled_from(sorted(self.tokens)))]
            shared = earlier.first(data.draw(st.integers(1, MAX_MODEL_LEN - 2)))
        # vLLM alone loses a session that is preempted with its last token in flight.
        sessions = not (self.stock and self.asynchronous) and not self.session_lives()
        resumable = sessions and data.draw(st.booleans())
        longest = MAX_MODEL_LEN // 3 if resumable else MAX_MODEL_LEN - 1
        length = data.draw(st.integers(min(max(1, len(shared)), longest), longest))
        prompt = shared[:length] + self.draw_tokens(data, length - len(shared))
        most = MAX_MODEL_LEN // 6 if resumable else MAX_MODEL_LEN - length
        max_tokens = data.draw(st.integers(1, most))
        request_id = f"r{len(self.tokens)}"
        self.tokens[request_id] = Tokens(prompt)
        self.start_over(request_id)
        asked = data.draw(st.sampled_from(ASKED)) if self.policies is TIGHT else None
        policy = self.served.default
        if asked is not None:
            try:
                num_tokens = MAX_MODEL_LEN if resumable else length
                policy = self.served.choose(asked, BLOCK_SIZE, num_tokens, max_tokens)
                asked = self.served.to_request(policy)
            except ValueError:
                asked = None
        self.seen["policies of their own"] += policy != self.served.default
        skew = self.served.layer_skew_tokens // BLOCK_SIZE
        shifts = (-skew, skew) if len(self.groups) > 1 else (0,)
        self.expected[request_id] = ExpectedRequest(
            self.tokens[request_id],
            policy,
            BLOCK_SIZE,
            self.tokens_per_step,
            self.spec.eviction_delay,
            shifts,
            bool(self.num_slots) and policy.recalls,
            self.served.recall_blocks,
            QUESTION_TOKENS,
        )
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            extra_args=asked and {REQUEST_KEY: asked},
        )
        if resumable:
            self.session, self.room = request_id, MAX_MODEL_LEN - length - max_tokens
            self.hung_up = False
            self.session_args = params.extra_args
        self.send(request_id, prompt, params, resumable)

    def send(
        self, request_id: str, prompt: list[int], params: SamplingParams, resumable: bool
    ) -> None:
        for scheduler in filter(None, (self.stock, self.scheduler)):
            request = Request(
                request_id,
                list(prompt),
                params,
                None,
                block_hasher=self.hasher,
                resumable=resumable,
            )
            scheduler.add_request(request)
        self.requests.setdefault(request_id, request)

    def start_over(self, request_id: str) -> None:
        self.curtailed.discard(request_id)
        self.evicted[request_id] = [{} for _ in self.groups]
        self.recalled[request_id] = [{} for _ in self.groups]

    def draw_tokens(self, data: st.DataObject, length: int) -> list[int]:
        seed = data.draw(st.integers(0, 50))
        return [(seed * 31 + i) % VOCAB_SIZE for i in range(length)]

    def session_lives(self) -> bool:
        return self.session in self.scheduler.requests

    @precondition(lambda self: self.session_lives() and not self.hung_up)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A session's user says more, while it answers or waits, or was preempted; or hangs up."""
        assert self.session is not None
        if self.room < 2 or data.draw(st.integers(0, 9)) == 0:
            self.hang_up()
            return
        length = data.draw(st.integers(1, self.room - 1))
        max_tokens = data.draw(st.integers(1, min(self.room - length, MAX_MODEL_LEN // 6)))
        self.room -= length + max_tokens
        # What a chunk does not ask for stays as the session has it.
        extra_args = data.draw(st.sampled_from([None, self.session_args]))
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra_args
        )
        status = self.requests[self.session].status
        self.seen["said while preempted"] += status == RequestStatus.PREEMPTED
        self.send(self.session, self.draw_tokens(data, length), params, resumable=True)
        self.check()

    def hang_up(self) -> None:
        if self.session_lives() and not self.hung_up:
            assert self.session is not None
            self.send(self.session, [0], SamplingParams(max_tokens=1), resumable=False)
        self.hung_up = True

    def follow_session(self, session: Request, update: Any) -> None:
        """What the session's tokens are, and where its turns end, once its next turn begins."""
        num_kept = session.num_tokens - 1
        self.expected[session.request_id].turns.append((session.num_prompt_tokens, num_kept))
        self.tokens[session.request_id].grow(num_kept, update.prompt_token_ids)
        self.seen["turns of preempted"] += session.num_computed_tokens == 0
        self.update_session(session, update)
        self.seen["turns"] += 1
        self.seen["turns after an eviction"] += any(self.evicted[session.request_id])
        self.seen["turns after a preemption"] += session.num_preemptions > 0

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Also while the request's step is in flight."""
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        for scheduler in filter(None, (self.stock, self.scheduler)):
            scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.seen["aborted in flight"] += self.requests[request_id].num_in_flight_tokens > 0
        self.check()

    @precondition(lambda self: self.asynchronous or not self.in_flight)
    @precondition(lambda self: not self.pauses())
    @rule()
    def start_all_over(self) -> None:
        """As when weights are updated: every running request is preempted."""
        for scheduler in filter(None, (self.stock, self.scheduler)):
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        assert not any(block.block_hash for block in self.pool.blocks)
        self.check()

    def pauses(self) -> bool:
        """Whether a session that does not run holds blocks: vLLM resets no cache then."""
        return any(
            request.num_computed_tokens and request.status != RequestStatus.RUNNING
            for request in self.scheduler.requests.values()
        )

    # -- what the engine does ----------------------------------------------------------

    @precondition(lambda self: len(self.in_flight) < self.max_in_flight)
    @rule()
    def schedule(self) -> None:
        if self.num_drafts and not self.asynchronous:
            self.draft()
        output = self.scheduler.schedule()
        stock_output = self.stock.schedule() if self.stock else None
        if stock_output is not None:
            self.check_like_stock(output, stock_output)
        self.follow(output)
        ahead: Counter[str] = Counter()
        for *_, rejected in self.in_flight:
            ahead.update(rejected)
        result = self.worker.execute(output, self.tokens, ahead)
        rejected = {}
        drafts = output.scheduled_spec_decode_tokens
        for of, sampled in zip(result.req_ids, result.sampled_token_ids, strict=True):
            num_accepted = max(0, len(sampled) - 1)
            rejected[of] = len(drafts.get(of, ())) - num_accepted
            self.seen["drafts accepted"] += num_accepted
            self.seen["drafts rejected"] += rejected[of]
            self.seen["steps behind drafts"] += ahead[of] > 0
        self.in_flight.append((output, stock_output, result, rejected))
        self.check()
        self.check_step(output)

    def draft(self) -> None:
        """As n-gram speculation does after a step: guesses for every request that decodes."""
        for request_id, request in self.requests.items():
            decodes = request.num_computed_tokens == request.num_tokens - 1
            if decodes and request.status == RequestStatus.RUNNING:
                guessed = self.tokens[request_id].drafts(request.num_tokens)
                request.spec_token_ids = guessed[: self.num_drafts]

    @precondition(lambda self: len(self.in_flight) == self.max_in_flight)
    @rule()
    def settle(self) -> None:
        """The engine waits for a step once it has scheduled as many as it may."""
        self._settle_oldest()

    def _settle_oldest(self) -> None:
        output, stock_output, result, _ = self.in_flight.popleft()
        self.seen["stale scores"] += sum(
            self.requests[request_id].num_stale_output_tokens > 0
            for request_id in scores_of(result).get(0, {})
        )
        self.scheduler.update_from_output(output, result)
        if self.stock:
            self.stock.update_from_output(stock_output, result)
        self.check()

    @rule(num_steps=st.integers(2, 30))
    def run(self, num_steps: int) -> None:
        """The engine's own loop: keep as many steps in flight as there may be."""
        for _ in range(num_steps):
            if not self.scheduler.has_requests():
                break
            if len(self.in_flight) < self.max_in_flight:
                self.schedule()
            else:
                self.settle()

    def teardown(self) -> None:
        """Whatever happened, what is left finishes and the pool is whole."""
        if not hasattr(self, "scheduler"):
            return
        self.hang_up()
        for _ in range(MAX_REQUESTS * 2 * MAX_MODEL_LEN):
            if not self.scheduler.has_unfinished_requests():
                break
            self.run(1)
        assert not self.scheduler.requests, "requests starve"
        assert not any(manager.stats.fallbacks for manager in self.managers.values())
        while self.in_flight:
            self._settle_oldest()
        for request_id, request in self.requests.items():
            outputs = list(request.output_token_ids)
            start = len(request.prompt_token_ids)
            assert outputs == self.tokens[request_id].first(start + len(outputs))[start:]
            if request.status != RequestStatus.FINISHED_ABORTED:
                assert len(outputs) == request.max_tokens
        for manager in self.managers.values():
            check_pool_whole(manager)
        if self.scheduler.host_pool is not None:
            assert not self.scheduler.host_pool._slots, "kept for a request that is gone"
            self.scheduler.host_pool.forget_contents()
            assert self.scheduler.host_pool.num_used == 0
        for scheduler in filter(None, (self.stock, self.scheduler)):
            scheduler.shutdown()

    # -- what must hold ----------------------------------------------------------------

    def follow(self, output: Any) -> None:
        """Note what was evicted, and that it was allowed to be."""
        step = step_of(output)
        begun = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        hits = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True)) | begun
        gone = output.preempted_req_ids or set()
        resumed = cached.resumed_req_ids | (begun.keys() & (self.preempted | gone))
        self.preempted = (self.preempted | gone) - resumed
        evictions = step.evictions if step else {}
        if not self.served.layer_skew_tokens and not self.num_slots:
            assert len({tuple(of) for of in evictions.values()}) <= 1, "all groups at once"
            assert len(evictions) in (0, len(self.groups))
        for of_group in evictions.values():
            for request_id, blocks in of_group.items():
                # A session that goes on may lose blocks and find no room for more.
                waits = self.requests[request_id].status != RequestStatus.RUNNING
                assert not waits or request_id == self.session
                assert request_id not in resumed
                others = [of.get(request_id) for of in evictions.values()]
                self.seen["groups that differ"] += any(blocks != of for of in others)
                self.seen["one group alone"] += len(self.groups) > 1 and len(others) < 2
        for group, of_group in (step.recalls if step else {}).items():
            for request_id, places in of_group.items():
                assert len(places) <= len(evictions[group][request_id]), "more come than go"
        self.seen["reads"] += sum(map(len, step.reads.values())) if step else 0
        for request_id in resumed | gone:
            self.start_over(request_id)
        for *_, rejected in self.in_flight:
            for request_id in resumed | begun.keys():
                rejected.pop(request_id, None)
        self.seen["steps"] += 1
        self.seen["resumed"] += len(resumed)
        self.seen["resumed with a hit"] += sum(hits[request_id] > 0 for request_id in resumed)
        self.seen["hits"] += sum(begun[name] > 0 for name in begun.keys() - resumed)

    def record(self, group: int, evict_at: Any, request_id: str, state: Any, at: int) -> None:
        """Note what is evicted at a point and what comes back, and that it is allowed to."""
        request = self.requests[request_id]
        in_flight = request.num_computed_tokens - request.num_in_flight_tokens
        assert at <= in_flight, "a step in flight reads these blocks"
        before = state.kept_at(at // BLOCK_SIZE)
        evict_at(request_id, state, at)
        after = set(state.kept)
        evicted = [i for i in before if i not in after]
        budget = self.served.budget(self.expected[request_id].policy, BLOCK_SIZE, group)
        protected = before[: budget.sink] + before[len(before) - budget.recent :]
        assert not set(evicted) & set(protected)
        recalled = sorted(after - set(before))
        if evicted:
            self.evicted[request_id][group][at] = evicted
            self.seen["evictions"] += 1
        if recalled:
            self.recalled[request_id][group][at] = recalled
            self.seen["recalls"] += 1
            self.seen["recalls of an answer"] += at > request.num_prompt_tokens

    def make_room(
        self, with_room: Any, request_id: str, evicted: Any, swaps: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Count the recalls for which there is no room."""
        try:
            left: list[tuple[int, int]] = with_room(request_id, evicted, swaps)
        except NoRoomError:
            self.seen["no room to recall"] += 1
            raise
        if left != swaps:  # beside a session that holds its blocks; nobody can be preempted
            assert self.session not in (None, request_id)
            running = {r for r in self.requests.values() if r.status == RequestStatus.RUNNING}
            assert running <= {self.requests[request_id]}
            self.curtailed.add(request_id)
        return left

    def check(self) -> None:
        tables = {
            (group, request_id): table
            for group, manager in self.managers.items()
            for request_id, table in manager.req_to_blocks.items()
        }
        check_pool(self.pool, tables)
        for _, request_id in tables:
            assert request_id in self.scheduler.requests
        for group, manager in self.managers.items():
            for request_id, state in manager._requests.items():
                assert (group, request_id) in tables
                assert state.kept == sorted(set(state.kept))
            # Scheduling ahead, a step is scheduled between scores and the eviction they are for.
            assert min(manager.stats.score_ages, default=2) >= 1 + self.asynchronous
        if self.scheduler.host_pool is not None:
            held = {
                Owner(group, request_id): {i for i, b in enumerate(table) if not b.is_null}
                for (group, request_id), table in tables.items()
            }
            check_host_pool(self.scheduler.host_pool, held)
            self.seen["host memory full"] += self.forgets and not self.scheduler.host_pool._free
        first, *others = (manager.stats for manager in self.managers.values())
        for stats in others:
            if not self.served.layer_skew_tokens and not self.num_slots:
                assert stats.evicted_blocks == first.evicted_blocks
            assert (stats.evictions, stats.evicting_requests) == (0, 0), "counted once"
        for request_id, tokens in self.tokens.items():
            self.hashes.learn(self.requests[request_id], tokens)
        self.hashes.check_cached_blocks(self.pool, self.worker.cache)

    def check_step(self, output: Any) -> None:
        for request_id in output.num_scheduled_tokens:
            delay, (start, really) = self.spec.eviction_delay, self.worker.spans[request_id]
            end = self.requests[request_id].num_computed_tokens
            expected = self.expected[request_id]
            for group, manager in self.managers.items():
                table = manager.req_to_blocks[request_id]
                row = self.worker.rows[request_id][group]
                assert [block.block_id for block in table] == row
                held = sum(not block.is_null for block in table)
                behind = min(end + self.num_ahead, MAX_MODEL_LEN)
                assert len(table) >= -(-behind // BLOCK_SIZE)
                assert all(block.ref_cnt == 1 for block in table[end // BLOCK_SIZE :])
                most = manager.kv_cache_spec.admission_blocks(expected.policy)
                if most is not None:
                    assert held <= most
                if not self.forgets and request_id not in self.curtailed:
                    settled = start - delay
                    due = expected.until(settled)[group]
                    for happened, of in (
                        (self.evicted, due.evicted),
                        (self.recalled, due.recalled),
                    ):
                        until = {at: blocks for at, blocks in of.items() if at <= settled}
                        assert happened[request_id][group] == until, (request_id, start, expected)
            if self.forgets or request_id in self.curtailed:
                continue  # what can come back depends on the others
            # Nor does it matter how the prompt was cut into chunks, or when scores came.
            expected.until(start)
            for position, slot in self.worker.slots_of(request_id, really):
                assert slot.gone == expected.gone_at(position)

    def check_like_stock(self, output: Any, stock: Any) -> None:
        """With an ample budget, every decision is the one of vLLM without a policy."""
        assert output.num_scheduled_tokens == stock.num_scheduled_tokens
        for ours, theirs in zip(output.scheduled_new_reqs, stock.scheduled_new_reqs, strict=True):
            assert (ours.req_id, ours.block_ids, ours.num_computed_tokens) == (
                theirs.req_id,
                theirs.block_ids,
                theirs.num_computed_tokens,
            )
        assert output.scheduled_cached_reqs == stock.scheduled_cached_reqs
        assert output.finished_req_ids == stock.finished_req_ids
        step = step_of(output) or KVPolicyStep()
        # The next turn of a session may ask at any token, and what asked is then looked at.
        sessions = {name for name in step.keeps_queries if self.requests[name].resumable}
        assert step == KVPolicyStep(keeps_queries=sessions)
        assert not any(manager.stats.evicted_blocks for manager in self.managers.values())


@pytest.mark.parametrize("policies", [TIGHT, AMPLE], ids=["tight", "ample"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_schedulers(asynchronous: bool, policies: list[dict[str, Any]], llama: str) -> None:
    seen: Counter[str] = Counter()
    run_lives(lambda: SchedulerMachine(llama, asynchronous, policies, seen), 400)
    # Lives without these would show nothing.
    common = {"steps": 5000, "hits": 50, "resumed": 50, "resumed with a hit": 5}
    common["aborted in flight"] = 20
    if policies is TIGHT or not asynchronous:
        common |= {"turns": 100, "turns after a preemption": 10}
    if policies is TIGHT:
        common |= {"evictions": 2000, "policies of their own": 100, "groups that differ": 100}
        common["one group alone"] = 20
        common["turns after an eviction"] = 20
        common |= {"recalls": 200, "recalls of an answer": 50, "reads": 200}
        common["host memory full"] = 100
        if asynchronous:
            common |= {"stale scores": 20, "steps behind drafts": 200}
        common |= {"drafts accepted": 200, "drafts rejected": 200}
    assert all(seen[what] >= least for what, least in common.items()), seen
