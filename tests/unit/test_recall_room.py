"""Blocks that come back find their room as any other block does: by preemption, or waiting."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_semantic.engine.manager import NoRoomError
from vllm_semantic.messages import attach_scores, step_of

from .test_sessions import BLOCK_SIZE, scheduler_under

SHARED = list(range(100, 121))
"""What two sessions begin with."""
SHARED_BLOCKS = range(5)
"""These score highest, in up to :data:`CUT_DOWN` tokens; then all others."""
CUT_DOWN = 68
POLICY = {"sink_tokens": 0, "recent_tokens": 4, "semantic_tokens": 28}


class Engine:
    """A scheduler of ours, and a worker that wants what it is told to want."""

    def __init__(self, model: str, num_blocks: int) -> None:
        self.scheduler = scheduler_under(
            model, num_slots=64, num_blocks=num_blocks, caching=True, **POLICY
        )
        (self.manager,) = self.scheduler.kv_policy_managers.values()
        self.manager.question_tokens = BLOCK_SIZE
        self.refused = 0
        """How often there was no room."""
        self._with_room, self.manager._with_room = self.manager._with_room, self._count
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)

    def add(self, name: str, prompt: list[int], max_tokens: int, session: bool = True) -> Request:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = Request(name, prompt, params, None, block_hasher=self._hasher, resumable=session)
        self.scheduler.add_request(request)
        return request

    def _count(self, *args: Any) -> Any:
        try:
            return self._with_room(*args)
        except NoRoomError:
            self.refused += 1
            raise

    def run(self, num_steps: int = 60) -> int:
        """So many steps, or all that there are; how many there were."""
        for step in range(num_steps):
            output = self.scheduler.schedule()
            if not (names := list(output.num_scheduled_tokens)):
                return step
            requests = [self.scheduler.requests[name] for name in names]
            sampled = [[7] if of.num_computed_tokens >= of.num_tokens else [] for of in requests]
            result = ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
            )
            asked = step_of(output).score_requests if step_of(output) else {}
            scores: Any = {
                group: {
                    name: [
                        float((block in SHARED_BLOCKS) != (request.num_tokens > CUT_DOWN))
                        for block in request.scored_indices
                    ]
                    for name, request in of_group.items()
                }
                for group, of_group in asked.items()
            }
            attach_scores(result, scores)
            self.scheduler.update_from_output(output, result)
        return num_steps

    def cut_down(self) -> None:
        """Two sessions that share blocks; one has grown beyond its budget and kept those."""
        for name, own in (("a", 50), ("b", 60)):
            self.add(name, [*SHARED, *[own] * 3], 2)
            self.run()
        self.add("a", [51] * 40, 2)
        self.run()
        assert self.manager.stats.evicted_blocks > 0

    def ask(self) -> list[int]:
        """One session's next turn, which wants others of its blocks; what it holds then."""
        self.add("a", [52] * 3, 2)
        assert self.run() < 60, "for ever"
        assert self.scheduler.requests["a"].num_tokens > CUT_DOWN
        table = self.manager.req_to_blocks["a"]
        return [i for i, block in enumerate(table) if not block.is_null]


def test_what_comes_back_does_not_depend_on_what_else_runs(llama: str) -> None:
    """The session gives way, and is read again when the other has ended."""
    ample, tight = Engine(llama, 64), Engine(llama, 21)
    for engine in (ample, tight):
        engine.cut_down()
        engine.add("c", [70] * 13, 40, session=False)
        engine.run(6)
    assert tight.ask() == ample.ask()
    assert (ample.refused, tight.refused) == (0, 1)
    assert tight.manager.stats.recalled_blocks > 1


def test_beside_sessions_that_hold_the_pool_as_many_come_back_as_fit(llama: str) -> None:
    ample, tight = Engine(llama, 64), Engine(llama, 16)
    for engine in (ample, tight):
        engine.cut_down()
    assert len(tight.ask()) == len(ample.ask()), "within the budget all the same"
    assert tight.refused == 0
    assert tight.scheduler.requests["a"].num_preemptions == 0
    assert 0 < tight.manager.stats.recalled_blocks < ample.manager.stats.recalled_blocks
