"""The block manager of a KV cache group under a policy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

from ..config import check_block_size
from ..messages import (
    BlockIndices,
    ScoreRequest,
    earlier_turns_of,
    extra_args_of,
    policy_of,
)
from ..ops.scoring import Reduction
from ..policies import KVPolicy
from ..policies.base import BlockBudget
from ..policies.check import POLICY_ERRORS
from ..policies.selection import (
    Question,
    blocks_to_evict,
    blocks_to_swap,
    eviction_point_of_turns,
    is_eviction_point,
    prompt_end,
    question_after,
    with_continuations,
)
from .explain import explain_eviction, sum_up_request
from .recalls import Recalls
from .request_blocks import RequestBlocks
from .stats import EvictionStats

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

QUESTION_TOKENS = 256
"""The most tokens at the end of a prompt that see evicted blocks, and choose which come back."""

RECALL_MARGIN = 0.1
"""A recalled block must score this share higher than the block it replaces (0.1 = 10 %). At the end
of a question any higher score is enough, and a block scores no more than this share below the one
before it."""

MAX_BUDGETS = 1024
"""Policies of requests whose budgets are remembered."""


class BoundedSpec(Protocol):
    """What the manager asks of the spec of its layers, :class:`~.spec.SemanticSpec`."""

    block_size: int
    prefill_interval: int
    eviction_delay: int
    recall_blocks: int

    @property
    def policy(self) -> KVPolicy: ...

    def budget(self, policy: KVPolicy) -> BlockBudget: ...

    def least_budget_blocks(self, policy: KVPolicy) -> int: ...

    def admission_blocks(self, policy: KVPolicy) -> int | None: ...


def has_drafts_in_flight(request: Request) -> bool:
    """Whether a request's steps in flight may compute fewer tokens than were scheduled.

    Each owes a token; what vLLM expects of them beyond one was drafted. Two steps in flight without
    drafts look the same, and are waited for too.
    """
    return request.num_output_placeholders > 1


class NoRoomError(Exception):
    """The pool has no block for what comes back: some request has to be preempted first."""


class SemanticManager(FullAttentionManager):
    """Keeps each request within the budget of blocks of its policy.

    Evicted blocks become null blocks in ``req_to_blocks`` and return to the pool at once;
    ``RSWAManager`` (vllm/v1/core/single_type_kv_cache_manager.py) is the precedent for
    tables with holes. Everything per request is dropped when its blocks are freed, which
    covers finish, abort and preemption.
    """

    def __init__(self, kv_cache_spec: BoundedSpec, **kwargs: Any) -> None:
        check_block_size(kv_cache_spec.policy, kv_cache_spec.block_size)
        super().__init__(kv_cache_spec, **kwargs)
        self.default_policy = kv_cache_spec.policy
        self.prefill_interval = kv_cache_spec.prefill_interval
        self.eviction_delay = kv_cache_spec.eviction_delay
        # Every eviction point but a prompt's end is a multiple of this.
        self._point_spacing = math.gcd(self.block_size, self.prefill_interval)
        self.stats_by_policy: defaultdict[str, EvictionStats] = defaultdict(EvictionStats)
        self.requests: Mapping[str, Request] = {}
        """The scheduler's live requests by id. Written by the scheduler."""
        self.is_first = True
        """Whether the manager is that of the first group: what happens to a request once, however
        many groups its layers are in, is counted there. Written by the scheduler."""
        self.recalls: Recalls | None = None
        """The group's evicted blocks; ``None``: they are lost. Written by the scheduler."""
        self.recall_blocks = kv_cache_spec.recall_blocks
        self.question_tokens = QUESTION_TOKENS
        self.num_steps = 0
        """Scheduler steps so far, this one included. Written by the scheduler."""
        self.quiet_until: dict[str, float] = {}
        """By request, a number of computed tokens. While a step ends at or before it, the workers
        keep none of the request's queries, score none of its blocks and read no host memory."""
        self._budget_of = lru_cache(MAX_BUDGETS)(kv_cache_spec.budget)
        self._least_blocks = lru_cache(MAX_BUDGETS)(kv_cache_spec.least_budget_blocks)
        self._points: dict[str, float] = {}
        """By request, the next point at which blocks have to go; an eviction only moves it on."""
        self._requests: dict[str, RequestBlocks] = {}
        self._evictions: dict[str, BlockIndices] = {}

    @property
    def stats(self) -> EvictionStats:
        """The counters of all policies together."""
        return sum(self.stats_by_policy.values(), EvictionStats())

    # -- what the scheduler asks ------------------------------------------------------

    def clip_to_eviction_point(self, request: Request, num_computed: int, num_new: int) -> int:
        """Shorten a chunk so that it runs neither past an eviction point nor into a question.

        Args:
            request: the request to schedule.
            num_computed: tokens computed or in flight before the chunk.
            num_new: tokens the scheduler would like to compute.

        Returns:
            At most ``num_new`` tokens; 0 while drafts in flight decide whether the request is at an
            eviction point.
        """
        if not policy_of(request, self.default_policy).bounded:
            return num_new
        request_id, num_prompt = request.request_id, request.num_prompt_tokens
        if self.eviction_delay and self._is_point(request_id, num_computed, num_prompt):
            if has_drafts_in_flight(request):
                return 0
            # What still sees the evicted blocks is this one token, however steps fall.
            return min(num_new, self.eviction_delay)
        point = self._next_point(request_id, num_computed, num_prompt)
        question = self.question(request, num_computed)
        if question is not None and num_computed < question.start:
            point = min(point, question.start)
        return min(num_new, point - num_computed)

    def max_prefix_hit_tokens(self, request: Request) -> int | None:
        """The longest prefix hit that still computes the queries of the first eviction.

        Without this limit a request would evict other blocks when its prefix was cached.
        """
        policy = policy_of(request, self.default_policy)
        if not policy.bounded:
            return None
        point = self._next_over_budget_point(request.request_id, 0, request.num_prompt_tokens)
        return max(0, point - policy.num_queries) // self.block_size * self.block_size

    def keeps_queries(self, request: Request, num_computed: int, num_new: int) -> bool:
        """Whether a chunk holds a query that the request's next eviction will look at.

        Args:
            request: a request of the step.
            num_computed: tokens computed before the chunk.
            num_new: tokens of the chunk.
        """
        request_id = request.request_id
        if num_computed >= self._points.get(request_id, 0):
            policy, point = policy_of(request, self.default_policy), math.inf
            if policy.bounded and policy.scores_blocks:
                point = self._next_point(request_id, num_computed, request.num_prompt_tokens)
            self._points[request_id] = point
            quiet_until = point - policy.num_queries
            if (question := self.question(request, num_computed)) is not None:
                quiet_until = min(quiet_until, question.start)
            if request.resumable and self._may_recall(policy):
                quiet_until = 0  # its next turn may ask at any token
            self.quiet_until[request_id] = quiet_until
        return num_computed + num_new > self.quiet_until[request_id]

    def score_request(self, request: Request, num_computed: int) -> ScoreRequest | None:
        """Ask for scores if the step just scheduled ends where blocks have to go, or may come back.

        At the end of a question the sink blocks are left out, and the highest layer counts in
        place of the mean.

        Args:
            request: a request of the step.
            num_computed: tokens computed once the step has run.
        """
        request_id, policy = request.request_id, policy_of(request, self.default_policy)
        if not policy.scores_blocks or not self._is_point(
            request_id, num_computed, request.num_prompt_tokens
        ):
            return None
        state = self._requests.setdefault(request_id, RequestBlocks())
        kept = state.kept_at(num_computed // self.block_size)
        recallable: Mapping[int, int] = {}
        # What comes back at a point that is not settled yet has to have a score at this one too.
        unsettled = range(num_computed - self.eviction_delay, num_computed + 1)
        if self.recall_blocks or any(self._ends_question(request, n) for n in unsettled):
            recallable = self._away(request_id, policy, kept)
            self.stats_by_policy[policy.name].read_blocks += len(recallable)
        over_layers: Reduction = "mean"
        if self._ends_question(request, num_computed):
            # Few layers look for what is asked for, and heads that look for nothing at the sink.
            over_layers, kept = "max", kept[self._budget_of(policy).sink :]
        blocks = self.req_to_blocks[request_id]
        held = list(kept)
        if num_computed % self.block_size:
            held.append(num_computed // self.block_size)
        state.asked_in_step[num_computed] = self.num_steps
        state.num_scored += len(kept)
        self.stats_by_policy[policy.name].scored_blocks += len(kept)
        block_ids = [blocks[i].block_id for i in held]
        return ScoreRequest(policy, num_computed, kept, block_ids, recallable, over_layers)

    def record_scores(self, request_id: str, asked: ScoreRequest, scores: Sequence[float]) -> None:
        """Keep scores for the eviction they were asked for; the request must still hold blocks."""
        if request_id not in self.req_to_blocks:
            return
        state = self._requests.setdefault(request_id, RequestBlocks())
        state.scores[asked.num_tokens] = dict(zip(asked.scored_indices, scores, strict=True))

    def question(self, request: Request, num_computed: int) -> Question | None:
        """The end of a prompt that sees evicted blocks too: what is being read, or comes next.

        Only of a request that has lost blocks before it ends: any other sees all there is. So it
        depends on the request alone, as eviction points do.

        Args:
            request: a request.
            num_computed: tokens computed; the question ends behind them.
        """
        if not self._may_recall(policy_of(request, self.default_policy)):
            return None
        num_prompt, turns = request.num_prompt_tokens, earlier_turns_of(request)
        found = question_after(num_computed, num_prompt, turns, self.question_tokens)
        if found is None:
            return None
        num_exact = self.num_exact_tokens(request.request_id)
        if num_exact == math.inf:  # nothing has gone yet: when will it?
            first = self._next_over_budget_point(request.request_id, 0, num_prompt)
            num_exact = first + self.eviction_delay
        return found if num_exact < found.end else None

    def reads(self, request: Request, num_computed: int) -> Mapping[int, int]:
        """What the tokens of a step see beside the blocks on the device; it is counted.

        Args:
            request: a request of the step.
            num_computed: tokens computed before the step.

        Returns:
            Slots in host memory by logical index; none unless a question is being read.
        """
        question = self.question(request, num_computed)
        if question is None or num_computed < question.start:
            return {}
        state = self._requests.get(request.request_id, RequestBlocks())
        kept = state.kept_at(num_computed // self.block_size)
        policy = policy_of(request, self.default_policy)
        slots = self._away(request.request_id, policy, kept)
        self.stats_by_policy[policy.name].read_blocks += len(slots)
        return slots

    @property
    def evicting(self) -> Mapping[str, BlockIndices]:
        """By request, what :meth:`take_evictions` will drain."""
        return self._evictions

    def take_evictions(self) -> dict[str, BlockIndices]:
        """Drain the evictions since the last call, for the workers."""
        evictions, self._evictions = self._evictions, {}
        return evictions

    def forget_points(self, request_id: str) -> None:
        """Drop the remembered eviction point of a request: it starts over, or its prompt grew."""
        self.quiet_until.pop(request_id, None)
        self._points.pop(request_id, None)

    def num_exact_tokens(self, request_id: str) -> float:
        """Leading tokens of a request that were computed before it lost any block."""
        state = self._requests.get(request_id)
        exact = None if state is None else state.num_exact_tokens
        return math.inf if exact is None else exact

    def filled_until(self, request: Request) -> int:
        """The number of computed tokens up to which a request needs no block and shares none.

        Args:
            request: has just been given blocks for a step; the tokens of that step are not
                counted as computed yet.

        Returns:
            A step that ends at or before this many tokens has its slots already, and completes no
            block that could be shared.
        """
        request_id = request.request_id
        until = len(self.req_to_blocks[request_id]) * self.block_size
        if self.enable_caching:
            next_full = (self.num_cached_block.get(request_id, 0) + 1) * self.block_size
            if next_full <= self.num_exact_tokens(request_id):
                until = min(until, next_full - 1)
        return until

    def evicts_from(self, request: Request) -> float:
        """The number of computed tokens at which the next evicting step begins, as in all groups.

        Args:
            request: as for :meth:`filled_until`.
        """
        if not policy_of(request, self.default_policy).bounded:
            return math.inf
        settled = request.num_computed_tokens - self.eviction_delay
        num_prompt = request.num_prompt_tokens
        point = self._next_point(request.request_id, settled, num_prompt)
        return point + self.eviction_delay  # as much later as scores take

    # -- vLLM's own hooks -------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self, request_id: str, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Count blocks; an admission asks for no more than the request's policy lets it hold.

        vLLM's method takes the cap from an attribute, one for all requests.
        """
        if apply_admission_cap:
            cap = self.kv_cache_spec.admission_blocks(self.policy_of(request_id))
            self.max_admission_blocks_per_request = cap
        return super().get_num_blocks_to_allocate(
            request_id, *args, apply_admission_cap=apply_admission_cap, **kwargs
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Evict down to the budget at an eviction point; called by ``allocate_slots``.

        Args:
            request_id: the request.
            processed_computed_tokens: tokens whose steps have been settled: nothing in
                flight writes the blocks before them.
            num_prompt_tokens: the request's prompt length.
        """
        start = processed_computed_tokens
        if self.eviction_delay:
            start += self.requests[request_id].num_in_flight_tokens
        point = start - self.eviction_delay
        if (
            num_prompt_tokens is None
            or point > processed_computed_tokens
            or not self._is_point(request_id, point, num_prompt_tokens)
        ):
            return
        state = self._requests.setdefault(request_id, RequestBlocks())
        if state.evicted_at == point:
            return
        self._evict_at(request_id, state, point)
        if state.num_exact_tokens is None:
            state.num_exact_tokens = start
            stats = self.stats_by_policy[self.policy_of(request_id).name]
            stats.evicting_requests += self.is_first

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget the request: it finished, was aborted, or was preempted."""
        policy = self.policy_of(request_id)
        if state := self._requests.pop(request_id, None):
            self.stats_by_policy[policy.name].recovered_blocks -= state.num_evicted
            held = len(self.req_to_blocks[request_id]) - state.num_evicted
            request = self.requests[request_id]
            sum_up_request(
                policy.name,
                request,
                self.kv_cache_group_id,
                state.num_evicted,
                held,
                state.num_scored,
            )
        self._evictions.pop(request_id, None)
        if self.recalls is not None:
            self.recalls.forget(request_id)
        self.forget_points(request_id)
        return super().pop_blocks_for_free(request_id)

    def policy_of(self, request_id: str) -> KVPolicy:
        """The policy of a request, by its id."""
        return policy_of(self.requests.get(request_id), self.default_policy)

    # -- helpers ----------------------------------------------------------------------

    def _is_point(self, request_id: str, num_tokens: int, num_prompt_tokens: int) -> bool:
        """Whether blocks go, or may come back, once ``num_tokens`` are computed.

        Asked for every request in many steps: the first lines answer almost always.
        """
        request = self.requests.get(request_id)
        if turns := earlier_turns_of(request):
            num_prompt_tokens = prompt_end(num_tokens, num_prompt_tokens, turns)
        if num_tokens % self._point_spacing and num_tokens != num_prompt_tokens:
            return False
        policy = self.policy_of(request_id)
        if not policy.bounded or not is_eviction_point(
            num_tokens, num_prompt_tokens, self.block_size, self.prefill_interval
        ):
            return False
        least_blocks = self._least_blocks(policy)
        if self._num_kept_at(request_id, num_tokens, least_blocks) > least_blocks:
            return True
        return num_tokens == num_prompt_tokens and self._ends_question(request, num_tokens)

    def _ends_question(self, request: Request | None, num_tokens: int) -> bool:
        """Whether a question has been read once ``num_tokens`` are computed."""
        question = None if request is None else self.question(request, num_tokens - 1)
        return question is not None and question.end == num_tokens

    def _next_over_budget_point(
        self, request_id: str, num_tokens: int, num_prompt_tokens: int
    ) -> int:
        """The first eviction point after ``num_tokens`` at which blocks have to go."""
        least_blocks = self._least_blocks(self.policy_of(request_id))
        num_over_budget = least_blocks + 1 - self._num_kept_at(request_id, 0, least_blocks)
        first = max(num_tokens + 1, num_over_budget * self.block_size)
        turns = earlier_turns_of(self.requests.get(request_id))
        return eviction_point_of_turns(
            first, num_prompt_tokens, turns, self.block_size, self.prefill_interval
        )

    def _next_point(self, request_id: str, num_tokens: int, num_prompt_tokens: int) -> int:
        """The first point after ``num_tokens`` at which blocks go, or may come back."""
        point = self._next_over_budget_point(request_id, num_tokens, num_prompt_tokens)
        request = self.requests.get(request_id)
        question = None if request is None else self.question(request, num_tokens)
        return point if question is None else min(point, question.end)

    def _may_recall(self, policy: KVPolicy) -> bool:
        """Whether blocks may come back under a policy."""
        return self.recalls is not None and policy.recalls

    def _away(self, request_id: str, policy: KVPolicy, kept: BlockIndices) -> Mapping[int, int]:
        """The slots in host memory of blocks that are nowhere else, by logical index."""
        if self.recalls is None or not policy.recalls:
            return {}
        return self.recalls.away(request_id, kept)

    def _evict_at(self, request_id: str, state: RequestBlocks, point: int) -> None:
        """Evict down to the budget, and recall what is worth more than what is left."""
        num_full_blocks = point // self.block_size
        kept = state.kept_at(num_full_blocks)
        is_question = self._ends_question(self.requests.get(request_id), point)
        evicted, swaps = self._choose(request_id, state, kept, point, is_question)
        recalled = sorted(comes for _, comes in swaps)
        evicted = sorted([*evicted, *(goes for goes, _ in swaps)])
        table = self.req_to_blocks[request_id]
        # A block that is freed may lose its hash.
        gone = {i: (table[i].block_id, self._content(i, table[i])) for i in evicted}
        if evicted or not is_question:
            self._evict(request_id, evicted)
        self._recall(request_id, recalled)
        self._keep(request_id, gone)  # last: what comes back keeps its place there
        state.kept = sorted([*(i for i in kept if i not in gone), *recalled])
        state.num_seen, state.evicted_at = num_full_blocks, point
        state.scores = {later: s for later, s in state.scores.items() if later > point}
        state.asked_in_step = {p: step for p, step in state.asked_in_step.items() if p > point}

    def _choose(
        self,
        request_id: str,
        state: RequestBlocks,
        kept: BlockIndices,
        point: int,
        is_question: bool,
    ) -> tuple[BlockIndices, list[tuple[int, int]]]:
        """The blocks that go, and pairs of one that goes and one that comes back in its place.

        As the request's policy has it or, where it fails, the oldest go. A request that stayed
        over its budget would hold more than admission counts on.

        Raises:
            NoRoomError: what goes makes too little room for what comes. Nothing has changed.
        """
        policy = self.policy_of(request_id)
        budget, stats = self._budget_of(policy), self.stats_by_policy[policy.name]
        candidates = budget.candidates(kept)
        scored = state.scores.get(point, {})
        away: list[int] = []
        if is_question or self.recall_blocks:
            away = [i for i in self._away(request_id, policy, kept) if i in scored]
        swaps: list[tuple[int, int]] = []
        num_wanted = 0
        try:
            extra_args = extra_args_of(self.requests[request_id])
            both = [*candidates, *away]
            # What may come back need not be remembered: the newest queries alone decide.
            forgets = is_question or (self.recall_blocks > 0 and self._may_recall(policy))
            judged = state.judge(policy, both, point, extra_args, forgets)
            if is_question:
                judged = with_continuations(both, judged, RECALL_MARGIN)
            scores, of_away = judged[: len(candidates)], judged[len(candidates) :]
            evicted = blocks_to_evict(kept, budget, scores)
            if away:
                held = dict(zip(candidates, scores, strict=True))
                for block in evicted:
                    del held[block]
                most, margin = self.recall_blocks, RECALL_MARGIN
                if is_question:
                    most, margin = len(held), 0.0
                recallable = dict(zip(away, of_away, strict=True))
                swaps = blocks_to_swap(held, recallable, most, margin)
                num_wanted = len(held)
        except POLICY_ERRORS:  # a policy is anybody's code
            if state.num_fallbacks == 0:
                logger.exception(
                    "KV policy %s cannot choose among the blocks of request %s at %d tokens: "
                    "the oldest go, here and wherever it happens again to this request",
                    policy.name,
                    request_id,
                    point,
                )
            state.num_fallbacks += 1
            stats.fallbacks += 1
            scores = candidates
            evicted = blocks_to_evict(kept, budget, scores)
        swaps = self._with_room(request_id, evicted, swaps)
        stats.wanted_blocks += num_wanted
        asked_in_step = state.asked_in_step.get(point)
        if asked_in_step is not None and self.is_first:
            stats.score_ages[self.num_steps - asked_in_step] += 1
        explain_eviction(
            policy.name,
            request_id,
            self.kv_cache_group_id,
            point,
            candidates,
            scores,
            sorted([*evicted, *(goes for goes, _ in swaps)]),
            sorted(comes for _, comes in swaps),
        )
        return evicted, swaps

    def _with_room(
        self, request_id: str, evicted: BlockIndices, swaps: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The swaps, if the pool has a block for each that comes back.

        What goes makes the room for what comes, unless another request holds it too. To recall
        fewer would make a request's result depend on what else runs, so another request is
        preempted. Where none is left that runs, as many come back as there is room for.

        Raises:
            NoRoomError: some other request has to be preempted first.
        """
        table = self.req_to_blocks[request_id]
        num_free = self.block_pool.get_num_free_blocks()
        num_free += sum(table[i].ref_cnt == 1 for i in evicted)
        for n, (goes, _) in enumerate(swaps):
            num_free += (table[goes].ref_cnt == 1) - 1
            if num_free < 0:
                others = (of for name, of in self.requests.items() if name != request_id)
                if any(of.status == RequestStatus.RUNNING for of in others):
                    raise NoRoomError
                return swaps[:n]
        return swaps

    def _num_kept_at(self, request_id: str, num_tokens: int, least_blocks: int) -> int:
        """Blocks that the group of layers with the least budget would keep.

        Counted alike in all groups: they have the same eviction points, and the tokens after the
        first are approximate in all of them.
        """
        num_full_blocks = num_tokens // self.block_size
        state = self._requests.get(request_id)
        if state is None:
            return num_full_blocks
        return num_full_blocks + min(len(state.kept), least_blocks) - state.num_seen

    def _evict(self, request_id: str, block_indices: BlockIndices) -> None:
        stats = self.stats_by_policy[self.policy_of(request_id).name]
        stats.evictions += self.is_first
        if not block_indices:
            return  # another group of layers keeps fewer
        blocks = self.req_to_blocks[request_id]
        freed = [blocks[i] for i in block_indices]
        for i in block_indices:
            blocks[i] = self._null_block
        # The newest first, as vLLM frees a request: the oldest stay shareable longest.
        self.block_pool.free_blocks(reversed(freed))
        gone = set(block_indices)
        if self.recalls is not None:
            gone = {i for i in gone if not self.recalls.undo(request_id, i)}
        if gone:
            self._evictions[request_id] = sorted(gone.union(self._evictions.get(request_id, ())))
        stats.evicted_blocks += len(block_indices)
        stats.recovered_blocks += len(block_indices)

    def _recall(self, request_id: str, block_indices: BlockIndices) -> None:
        """Give blocks that come back a place on the device; the next step copies them there."""
        if not block_indices:
            return
        assert self.recalls is not None
        table = self.req_to_blocks[request_id]
        new_blocks = self.block_pool.get_new_blocks(len(block_indices))
        for i, block in zip(block_indices, new_blocks, strict=True):
            table[i] = block
            self.recalls.bring_back(request_id, i, block.block_id)
        stats = self.stats_by_policy[self.policy_of(request_id).name]
        stats.recalled_blocks += len(block_indices)
        stats.recovered_blocks -= len(block_indices)

    def _keep(self, request_id: str, evicted: Mapping[int, tuple[int, Any]]) -> None:
        """Keep evicted blocks in host memory: ids and block hashes by logical index."""
        policy = self.policy_of(request_id)
        if self.recalls is None or not policy.recalls:
            return
        stats = self.stats_by_policy[policy.name]
        for i, (block_id, block_hash) in evicted.items():
            kept = self.recalls.keep(request_id, i, block_id, block_hash)
            stats.copied_blocks += kept.copied
            stats.dropped_blocks += kept.dropped

    def _content(self, index: int, block: KVCacheBlock) -> Any:
        """The hash of a full block; ``None`` where there is none, or it is of a part of the block
        alone, as that of a prompt's last one can be."""
        is_whole = block.block_hash_num_tokens == (index + 1) * self.block_size
        return block.block_hash if is_whole else None
