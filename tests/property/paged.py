"""A paged KV cache without a model, and what a policy should do to a request, from its definition.

Everything that a real model would decide is a function of a request's tokens alone: the next
token and the scores of its blocks. So whatever depends on anything else is a bug.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
from vllm.v1.outputs import ModelRunnerOutput

from vllm_semantic.engine.backend import StepBuffers
from vllm_semantic.engine.held_blocks import HeldBlocks
from vllm_semantic.engine.host_pool import HostPool
from vllm_semantic.engine.query_windows import QueryWindows
from vllm_semantic.messages import KVPolicyStep, Owner, attach_scores, step_of
from vllm_semantic.policies import KVPolicy
from vllm_semantic.policies.base import BlockBudget

VOCAB_SIZE = 97
MAX_DRAFTS = 4
WRONG = -1
"""Stands in the cache for a token that was drafted and rejected."""


class Tokens:
    """A prompt and what the model would say to it."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = list(prompt)
        self._tokens: list[int] = []
        self._prefixes: list[int] = []

    def __getitem__(self, position: int) -> int:
        self.prefix(position)
        return self._tokens[position]

    def prefix(self, position: int) -> int:
        """Stands for the tokens up to and including ``position``."""
        while len(self._tokens) <= position:
            i, before = len(self._tokens), self._prefixes[-1] if self._prefixes else 0
            token = self.prompt[i] if i < len(self.prompt) else before % VOCAB_SIZE
            self._tokens.append(token)
            self._prefixes.append(hash((before, token)))
        return self._prefixes[position]

    def grow(self, num_kept: int, more: list[int]) -> None:
        """A session's next turn: what was computed is prompt now, and more comes behind it."""
        self.prompt = self.first(num_kept) + list(more)
        del self._tokens[num_kept:], self._prefixes[num_kept:]

    def first(self, length: int) -> list[int]:
        return [self[i] for i in range(length)]

    def drafts(self, position: int) -> list[int]:
        """What is guessed to be at ``position`` and behind it: more or less, right or wrong."""
        seed = self.prefix(position - 1)
        guessed = [self[position + i] for i in range(seed % (MAX_DRAFTS + 1))]
        return [(t + (seed >> i) % 4 // 3) % VOCAB_SIZE for i, t in enumerate(guessed)]

    def score(self, num_tokens: int, block: int, group: int = 0) -> float:
        """Similarity of a block to the newest query in the layers of a group; few values, so that
        ties are common."""
        return float(hash((self.prefix(num_tokens - 1), block, group)) % 7)


@dataclass
class ExpectedGroup:
    """What a request alone holds in a group of layers, computed from its beginning with plain
    sets."""

    policy: KVPolicy
    group: int
    shift: int
    """Blocks that the group keeps beyond the policy's budget."""
    alive: set[int] = field(default_factory=set)
    away: set[int] = field(default_factory=set)
    """Evicted, and not back."""
    evicted: dict[int, list[int]] = field(default_factory=dict)
    """Computed tokens at each eviction point at which blocks went -> these."""
    recalled: dict[int, list[int]] = field(default_factory=dict)
    """The same of those that came back."""
    scores: dict[int, float] = field(default_factory=dict)
    """What is remembered."""
    worth: dict[int, float] = field(default_factory=dict)
    """What is chosen by."""
    seen: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    """From which token on the request sees all but which blocks."""

    def gone_at(self, position: int) -> frozenset[int]:
        """What the token at ``position`` cannot see of the blocks on the device."""
        seen = [gone for first, gone in self.seen if first <= position]
        return seen[-1] if seen else frozenset()

    def choose(self, n: int, budget: BlockBudget, most_recalled: int, margin: float) -> None:
        """Evict down to the budget, then swap while what is away is worth more."""
        blocks = sorted(self.alive)
        middle = blocks[budget.sink : len(blocks) - budget.recent]
        by_age = not self.policy.selected_tokens
        gone: set[int] = set()
        while len(self.alive) > budget.total:
            worst = min(middle, key=lambda b: (0 if by_age else self.worth[b], b))
            middle.remove(worst)
            gone.add(worst)
            self.alive.remove(worst)
        back: set[int] = set()
        while middle and self.away and len(back) < most_recalled:
            worst = min(middle, key=lambda b: (self.worth[b], b))
            best = max(self.away, key=lambda b: (self.worth[b], b))
            if self.worth[best] <= self.worth[worst] * (1 + margin):
                break
            middle.remove(worst)
            self.away.remove(best)
            gone.add(worst)
            back.add(best)
            self.alive ^= {worst, best}
        self.away |= gone
        if gone:
            self.evicted[n] = sorted(gone)
        if back:
            self.recalled[n] = sorted(back)


@dataclass
class ExpectedRequest:
    """The same in all groups of layers, which have their eviction points in common."""

    tokens: Tokens
    policy: KVPolicy
    block_size: int
    prefill_interval: int
    delay: int = 0
    """Tokens after an eviction point that still see what goes there."""
    shifts: tuple[int, ...] = (0,)
    recalls: bool = False
    recall_blocks: int = 0
    question_tokens: int = 0
    """The most tokens at the end of a prompt that see all that there was."""
    num_tokens: int = 0
    first_point: int | None = None
    turns: list[tuple[int, int]] = field(default_factory=list)
    """Of a session: where a prompt ended, and the answer to it."""

    def __post_init__(self) -> None:
        self.groups = [ExpectedGroup(self.policy, *of) for of in enumerate(self.shifts)]

    def until(self, num_tokens: int) -> list[ExpectedGroup]:
        """The groups once so many tokens have been computed."""
        while self.num_tokens < num_tokens:
            self.num_tokens += 1
            self._advance()
        return self.groups

    def gone_at(self, position: int) -> frozenset[tuple[int, int]]:
        """Groups and blocks that the token at ``position`` cannot see, host memory included."""
        begun = 0
        for prompt, answer in (*self.turns, (len(self.tokens.prompt), 0)):
            if self.recalls and max(begun, prompt - self.question_tokens) <= position < prompt:
                return frozenset()
            begun = answer
        return frozenset((of.group, block) for of in self.groups for block in of.gone_at(position))

    def _budget(self, shift: int) -> BlockBudget:
        return self.policy.budget(self.block_size).shifted(shift)

    def _advance(self) -> None:
        n = self.num_tokens
        ends = (prompt for prompt, answer in self.turns if n <= answer)
        num_prompt = next(ends, len(self.tokens.prompt))
        if n % self.block_size == 0:
            for of in self.groups:
                of.alive.add(n // self.block_size - 1)
        if not self.policy.bounded:
            return
        within_prompt = n < num_prompt and n % self.prefill_interval == 0
        after_prompt = n > num_prompt and n % self.block_size == 0
        is_point = within_prompt or n == num_prompt or after_prompt
        least = min(self._budget(shift).total for shift in self.shifts)
        fewest = min(len(of.alive) for of in self.groups)
        over_budget = is_point and fewest > least
        first = self.first_point
        is_question = (
            self.recalls and n == num_prompt and first is not None and first + self.delay < n
        )
        if not over_budget and not is_question:
            return
        # What a policy remembers of earlier points is no answer to a question.
        recalls = is_question or (self.recalls and self.recall_blocks)
        decay = 0.0 if recalls else self.policy.decay
        for of in self.groups:
            scored = set(of.alive)
            if recalls:
                scored |= of.away
            of.scores = {
                b: self.tokens.score(n, b, of.group) + decay * of.scores.get(b, 0.0) for b in scored
            }
            of.worth = of.scores
            if is_question:
                sink = self._budget(of.shift).sink
                said = {b + 1: 0.9 * of.scores[b] for b in scored if b >= sink}
                of.worth = {b: max(of.scores[b], said.get(b, 0.0)) for b in scored}
            most, margin = (10**6, 0.0) if is_question else (self.recall_blocks, 0.1)
            of.choose(n, self._budget(of.shift), most if self.recalls else 0, margin)
        for of in self.groups:
            of.seen.append((n + self.delay, frozenset(of.away)))
        self.first_point = self.first_point or n


class Slot(NamedTuple):
    """What a token left in the cache."""

    prefix: int
    gone: frozenset[tuple[int, int]]
    """Groups and blocks of its request that it could not see."""
    exact: bool
    """Whether none that came before it had lost anything either."""
    group: int = 0
    """Of the layers that it is a key of."""


class PagedWorker:
    """Does with a scheduler's output what the workers do, and checks every read and write.

    Layers are in groups; block tables, and what is gone, are lists with one for each.
    """

    def __init__(
        self,
        block_size: int,
        num_queries: int,
        max_num_reqs: int,
        max_num_blocks: int,
        num_groups: int,
        num_drafts: int,
    ) -> None:
        self.block_size = block_size
        self.windows = QueryWindows(num_queries, max_num_reqs, num_drafts)
        self.buffers = StepBuffers(max_num_reqs, 1, self.windows, torch.device("cpu"))
        self.groups = range(num_groups)
        self.held = [HeldBlocks(max_num_reqs, max_num_blocks, block_size, 1) for _ in self.groups]
        self.queries: dict[int, tuple[str, int]] = {}
        """Row of the query buffers -> request and position."""
        self.cache: dict[int, dict[int, Slot]] = {}
        self.host: dict[int, dict[int, Slot]] = {}
        """By slot of the host pool."""
        self.rows: dict[str, list[list[int]]] = {}
        self.tables: dict[str, list[list[int]]] = {}
        """As vLLM's runner has them: what was evicted is still named there."""
        self.gone: dict[str, list[set[int]]] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        """First and last token of each request's chunk in the last step, as it really was."""

    def execute(
        self, output: Any, requests: dict[str, Tokens], ahead: Mapping[str, int]
    ) -> ModelRunnerOutput:
        """Run a step.

        Args:
            output: of the scheduler.
            requests: what they say.
            ahead: by request, rejected drafts of steps in flight: the scheduler counts them as
                computed, and the device knows better.
        """
        step = step_of(output) or KVPolicyStep()
        gone = output.finished_req_ids | (output.preempted_req_ids or set())
        self.windows.forget(gone)
        for held in self.held:
            held.forget(gone)
        self._copy(step)
        self._apply_evictions(step)
        spans = self._update_rows(output, requests)
        self._check_reads(step, requests)
        for group in self.groups:
            self._check_held(group, {r: end for r, (_, end, _) in spans.items()})
        assumed = {r: end for r, (_, end, _) in spans.items()}
        spans = {r: tuple(n - ahead.get(r, 0) for n in span) for r, span in spans.items()}
        self.spans = {r: (start, end) for r, (start, end, _) in spans.items()}
        drafts = {
            r: drafts if -1 not in drafts else requests[r].drafts(spans[r][2])[: len(drafts)]
            for r, drafts in output.scheduled_spec_decode_tokens.items()
        }
        accepted = {
            r: self._accepted(requests[r], known, drafts.get(r, []))
            for r, (*_, known) in spans.items()
        }
        for group in self.groups:
            for request_id, (start, end, _) in spans.items():
                right = spans[request_id][2] + accepted[request_id]
                self._write(group, request_id, requests[request_id], start, end, right, step)
        for group in self.groups:
            for request_id, (_, end, known) in spans.items():
                settled = min(end, known + accepted[request_id])
                self._read(group, request_id, requests[request_id], settled)
        if step.keeps_queries:
            self._keep_queries(step.keeps_queries, self.spans, assumed)
        result = ModelRunnerOutput(
            req_ids=list(spans),
            req_id_to_index={request_id: i for i, request_id in enumerate(spans)},
            sampled_token_ids=[
                [requests[request_id][known + i] for i in range(accepted[request_id] + 1)]
                if end >= known
                else []
                for request_id, (_, end, known) in spans.items()
            ],
        )
        if step.score_requests:
            assert [*step.score_requests] == [*self.groups], "all groups are asked at once"
            scores = {
                group: {
                    r: self._score(group, of, r, requests[r], spans[r], assumed[r], accepted[r])
                    for r, of in asked.items()
                }
                for group, asked in step.score_requests.items()
            }
            assert len({tuple(of_group) for of_group in scores.values()}) == 1
            attach_scores(result, scores)
        return result

    @staticmethod
    def _accepted(tokens: Tokens, known: int, drafts: list[int]) -> int:
        """How many of the tokens drafted for ``known`` and behind it are right."""
        wrong = (i for i, token in enumerate(drafts) if token != tokens[known + i])
        return next(wrong, len(drafts))

    def _check_held(self, group: int, seq_lens: dict[str, int]) -> None:
        """The kernels get every block that a request holds, in order, and no other."""
        held = self.held[group].rows(list(seq_lens), np.array(list(seq_lens.values())))
        if held is None:
            assert not any(self.gone[request_id][group] for request_id in seq_lens)
            return
        for request_id, columns, evicted in zip(
            seq_lens, held.columns, held.evicted_tokens, strict=True
        ):
            row, num_tokens = self.rows[request_id][group], seq_lens[request_id] - evicted
            kept = [i for i, block_id in enumerate(row) if block_id]
            num_kept = -(-num_tokens // self.block_size)
            assert columns[:num_kept].tolist() == kept[:num_kept]
            assert num_tokens <= len(kept) * self.block_size
            of_tables = self.tables[request_id][group]
            ids = [of_tables[i] for i in kept[:num_kept]]
            if held.block_ids is not None:
                back = held.block_ids[list(seq_lens).index(request_id)]
                ids = [int(b) or i for b, i in zip(back[:num_kept], ids, strict=True)]
            assert ids == [row[i] for i in kept[:num_kept]]

    def _keep_queries(
        self, wanted: set[str], spans: dict[str, tuple[int, int]], assumed: dict[str, int]
    ) -> None:
        assert wanted <= spans.keys()
        starts = np.cumsum([0, *(end - start for start, end in spans.values())])
        lengths = np.array(list(assumed.values()), np.int32)
        self.buffers.place_queries(self.windows.place(wanted, list(spans), starts, lengths))
        step: Any = SimpleNamespace(
            query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.tensor([end for _, end in spans.values()]),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
        )
        self.buffers.settle_places(step)
        places = self.buffers.query_places[1 : 1 + self.buffers.num_kept].tolist()
        batch = [(r, i) for r, (start, end) in spans.items() for i in range(start, end)]
        assert len({row for _, row in places}) == len(places), "two queries in one place"
        for source, row in places:
            assert batch[source][0] in wanted
            self.queries[row] = batch[source]

    def _check_window(self, request_id: str, end: int, num_queries: int) -> None:
        """Everything that a policy will be shown is a query of this request, in order."""
        first = max(0, end - num_queries)
        rows = self.windows.window(request_id, end, num_queries)
        shown = [self.queries.get(row) for row in rows]
        assert shown == [(request_id, position) for position in range(first, end)]

    def _copy(self, step: KVPolicyStep) -> None:
        if step.copies is None:
            return
        out, back = step.copies
        assert len({copy.slot for copy in out}) == len(out), "two blocks in one slot"
        assert len({copy.block_id for copy in back}) == len(back)
        for copy in out:
            self.host[copy.slot] = dict(self.cache[copy.block_id])
        for copy in back:
            self.cache[copy.block_id] = dict(self.host[copy.slot])

    def _apply_evictions(self, step: KVPolicyStep) -> None:
        for group, evictions in step.evictions.items():
            for request_id, blocks in evictions.items():
                row = self.rows[request_id][group]
                assert blocks == sorted(set(blocks))
                for block in blocks:
                    assert row[block] != 0, f"{request_id}: block {block} evicted twice"
                    row[block] = 0
                self.gone[request_id][group] |= set(blocks)
                self.held[group].evict(request_id, blocks)
        for group, recalls in step.recalls.items():
            for request_id, places in recalls.items():
                assert list(places) == sorted(places)
                for block, block_id in places.items():
                    assert self.rows[request_id][group][block] == 0, "came back, but was here"
                    self.rows[request_id][group][block] = block_id
                self.gone[request_id][group] -= places.keys()
                self.held[group].recall(request_id, places)

    def _update_rows(
        self, output: Any, requests: dict[str, Tokens]
    ) -> dict[str, tuple[int, int, int]]:
        """Take over block tables; first, last and known tokens of each request's span."""
        spans = {}
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
            self.tables.pop(request_id, None)
            self.gone.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = [list(block_ids) for block_ids in new.block_ids]
            self.tables[new.req_id] = [list(block_ids) for block_ids in new.block_ids]
            # A session's next turn comes as a new request, with what it has lost.
            self.gone[new.req_id] = [
                {i for i, block in enumerate(block_ids) if not block} for block_ids in new.block_ids
            ]
            known = new.prefill_token_ids or requests[new.req_id].prompt
            spans[new.req_id] = (new.num_computed_tokens, len(known))
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            new_block_ids = cached.new_block_ids[i] or [[] for _ in self.groups]
            if request_id in cached.resumed_req_ids:
                self.rows[request_id] = [[] for _ in self.groups]
                self.tables[request_id] = [[] for _ in self.groups]
                self.gone[request_id] = [set() for _ in self.groups]
            for of in (self.rows, self.tables):
                for row, more in zip(of[request_id], new_block_ids, strict=True):
                    row += more
            known = len(requests[request_id].prompt) + cached.num_output_tokens[i]
            spans[request_id] = (cached.num_computed_tokens[i], known)
        assert spans.keys() == output.num_scheduled_tokens.keys()
        return {
            request_id: (start, start + output.num_scheduled_tokens[request_id], known)
            for request_id, (start, known) in spans.items()
        }

    def gone_anywhere(self, request_id: str) -> frozenset[tuple[int, int]]:
        """Groups and blocks that a request has lost."""
        return frozenset(
            (group, block) for group in self.groups for block in self.gone[request_id][group]
        )

    def _check_reads(self, step: KVPolicyStep, requests: dict[str, Tokens]) -> None:
        """What is read in host memory is what the request has lost."""
        for group, reads in step.reads.items():
            for request_id, slots in reads.items():
                assert slots
                assert slots.keys() <= self.gone[request_id][group], "it is on the device"
                for i, slot in slots.items():
                    self._check_slot(group, requests[request_id], i, slot)

    def _check_slot(self, group: int, tokens: Tokens, block: int, slot: int) -> None:
        last = self.host[slot][self.block_size - 1]
        prefix = tokens.prefix((block + 1) * self.block_size - 1)
        assert (last.prefix, last.group) == (prefix, group)

    def _write(
        self,
        group: int,
        request_id: str,
        tokens: Tokens,
        start: int,
        end: int,
        right: int,
        step: KVPolicyStep,
    ) -> None:
        """Tokens from ``right`` on were drafted and are wrong."""
        gone = lost = self.gone_anywhere(request_id)
        for of_group, reads in step.reads.items():
            gone -= {(of_group, i) for i in reads.get(request_id, ())}
        for position in range(start, end):
            block_id = self.rows[request_id][group][position // self.block_size]
            assert block_id != 0, f"{request_id}: token {position} has no block"
            slots = self.cache.setdefault(block_id, {})
            prefix = tokens.prefix(position) if position < right else WRONG
            slots[position % self.block_size] = Slot(prefix, gone, not lost, group)

    def _read(self, group: int, request_id: str, tokens: Tokens, end: int) -> None:
        row = self.rows[request_id][group]
        holes = {i for i, block_id in enumerate(row) if block_id == 0}
        assert holes == self.gone[request_id][group]
        for position in range(end):
            block_id = row[position // self.block_size]
            if block_id:
                slot = self.cache[block_id][position % self.block_size]
                assert slot.prefix == tokens.prefix(position), f"{request_id} reads another's key"
                assert slot.group == group, f"{request_id} reads other layers' keys"

    def _score(
        self,
        group: int,
        asked: Any,
        request_id: str,
        tokens: Tokens,
        span: tuple[int, int, int],
        assumed: int,
        accepted: int,
    ) -> list[float]:
        _, end, known = span
        behind, settled, end = end < assumed, known + accepted, assumed
        row = self.rows[request_id][group]
        assert asked.block_indices == sorted(set(asked.block_indices))
        filling = [end // self.block_size] if end % self.block_size else []
        assert [row[i] for i in asked.block_indices + filling] == asked.block_ids
        assert 0 not in asked.block_ids, "asked to score what was evicted"
        held = [i for i in range(end // self.block_size) if row[i]]
        sink = asked.policy.budget(self.block_size).sink if asked.over_layers == "max" else 0
        assert asked.block_indices == held[sink:], "every full block that is held"
        if not behind:
            self._check_window(request_id, end, asked.policy.num_queries)
        for i, slot in asked.recallable.items():
            assert row[i] == 0, "it is here, and would have to come back"
            self._check_slot(group, tokens, i, slot)
        # Where the request has not come so far, what is found counts nowhere.
        if behind or end > settled:
            return [float(-i % 3) for i in asked.scored_indices]
        return [tokens.score(end, i, group) for i in asked.scored_indices]

    def slots_of(self, request_id: str, end: int) -> list[tuple[int, Slot]]:
        """Position and slot of each token that the request still sees, in any group."""
        return [
            (position, self.cache[row[position // self.block_size]][position % self.block_size])
            for row in self.rows[request_id]
            for position in range(end)
            if row[position // self.block_size]
        ]


class PrefixOfHash:
    """Which prefix a block hash of vLLM stands for."""

    def __init__(self, block_size: int, num_groups: int = 1) -> None:
        self.block_size = block_size
        self.groups = range(num_groups)
        self.prefix_of: dict[bytes, tuple[int, int]] = {}

    def learn(self, request: Any, tokens: Tokens) -> None:
        for i, block_hash in enumerate(request.block_hashes):
            prefix = tokens.prefix((i + 1) * self.block_size - 1)
            for group in self.groups:
                key = make_block_hash_with_group_id(block_hash, group)
                self.prefix_of[key] = prefix, group

    def check_cached_blocks(self, pool: Any, cache: dict[int, dict[int, Slot]]) -> int:
        """Every block in the prefix cache is full, exact, and of the prefix and layers it is filed
        under."""
        num_cached = 0
        for block in pool.blocks:
            if block.block_hash is None:
                continue
            num_cached += 1
            slots = cache[block.block_id]
            assert len(slots) == self.block_size
            assert all(slot.exact for slot in slots.values()), "an inexact block is shared"
            last = slots[self.block_size - 1]
            assert (last.prefix, last.group) == self.prefix_of[block.block_hash]
        return num_cached


def check_pool(pool: Any, tables: Mapping[Any, list[Any]]) -> None:
    """free + referenced + null = total, and reference counts are those of the tables."""
    references = Counter(
        block.block_id for table in tables.values() for block in table if not block.is_null
    )
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == len(set(free)) == pool.get_num_free_blocks(), "freed twice"
    assert len(free) + len(references) + 1 == pool.num_gpu_blocks
    assert not set(free) & references.keys()
    for block in pool.blocks[1:]:
        assert block.ref_cnt == references[block.block_id]
    assert pool.null_block.block_id == 0
    assert pool.null_block.is_null


def check_host_pool(pool: HostPool, held: Mapping[Owner, set[int]]) -> None:
    """Every slot is free or kept for somebody; no owner is gone, and what is held is full.

    Args:
        pool: of the scheduler.
        held: blocks on the device of each request and group that there is.
    """
    assert len(pool._free) == len(set(pool._free))
    assert sorted([*pool._free, *pool._kept]) == [*range(pool.num_slots)]
    owned: Counter[int] = Counter()
    for owner, slots in pool._slots.items():
        assert owner in held
        owned.update(slots.values())
        for index, slot in slots.items():
            assert pool._kept[slot].owners[owner] == index
    for slot, kept in pool._kept.items():
        assert len(kept.owners) == owned[slot]
        assert kept.owners or kept.content is not None, "kept for nobody"
        assert bool(kept.owners) != (slot in pool._idle)
    assert {kept.content: slot for slot, kept in pool._kept.items() if kept.content} == (
        pool._by_content
    )
    assert not pool._out
    assert not pool._back


def check_pool_whole(manager: Any) -> None:
    """Nothing of any request is left."""
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    check_pool(pool, {})
    assert not manager.req_to_blocks
    assert not manager.num_cached_block
    assert not manager._requests
    assert not manager._evictions
    assert manager.recalls is None or not manager.recalls.take()
