"""vLLM's example connector beside a policy: prompts that one step computes, and no others.

``ExampleConnector`` (``vllm/distributed/kv_transfer/kv_connector/v1/example_connector.py``) writes
all of a prompt to disk in the step that begins it, and reads all of it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..messages import BlockIndices

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class WholePrompts:
    """Keeps from vLLM's connector what it cannot know of requests under a policy.

    Args:
        connector: the scheduler's side of it.
        max_hit: as for :class:`~.offloading.Offloading`.
    """

    def __init__(
        self, connector: ExampleConnector, max_hit: Callable[[Request], int | None]
    ) -> None:
        self._connector = connector
        self._match_of_vllm = connector.get_num_new_matched_tokens
        self._max_hit = max_hit
        connector.get_num_new_matched_tokens = self._match  # type: ignore[method-assign]

    def lose(
        self, request_id: str, num_exact_tokens: int, evicted: Mapping[int, BlockIndices]
    ) -> None:
        """Nothing is copied of blocks that a request loses later."""

    def offered(self, output: SchedulerOutput) -> SchedulerOutput:
        """A step as the connector is shown it: of what begins, only prompts that it computes to the
        end, which it may store, and those that it reads."""
        begun = [
            new
            for new in output.scheduled_new_reqs
            if new.req_id in self._connector._requests_need_load
            or new.num_computed_tokens + output.num_scheduled_tokens[new.req_id]
            >= len(new.prompt_token_ids or ())
        ]
        return replace(output, scheduled_new_reqs=begun)

    def _match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As vLLM's, or nothing where that is more than would be found on the device."""
        found = self._match_of_vllm(request, num_computed_tokens)
        limit = self._max_hit(request)
        too_long = limit is not None and num_computed_tokens + (found[0] or 0) > limit
        return (0, False) if too_long else found
