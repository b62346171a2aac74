"""vLLM's KV offloading beside a policy: exact blocks go out and come back, no others.

``OffloadingConnector`` (``vllm/distributed/kv_transfer/kv_connector/v1``) copies each chunk of a
request once, when it has been computed, and takes it that a running request keeps its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..messages import BlockIndices

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
        OffloadingConnector,
    )
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class Offloading:
    """Tells vLLM's connector what it cannot know of requests under a policy.

    Args:
        connector: the scheduler's side of it.
        max_hit: the longest prefix that a request may find computed, in tokens, see
            :meth:`~.manager.SemanticManager.max_prefix_hit_tokens`; ``None``: any.
    """

    def __init__(
        self, connector: OffloadingConnector, max_hit: Callable[[Request], int | None]
    ) -> None:
        self._scheduler = connector.scheduler
        self._most_of_vllm = connector._max_loadable_tokens
        self._max_hit = max_hit
        connector._max_loadable_tokens = self._max_loadable_tokens  # type: ignore[method-assign]

    def offered(self, output: SchedulerOutput) -> SchedulerOutput:
        """A step as the connector is shown it: as it is."""
        return output

    def lose(
        self, request_id: str, num_exact_tokens: int, evicted: Mapping[int, BlockIndices]
    ) -> None:
        """Note blocks of a request that the step being scheduled may overwrite.

        Before the step runs, the workers finish what is being copied of the request. What it has
        not offered yet of these blocks, because there was no room for it, it never will, nor
        anything that it computes from now on.

        Args:
            request_id: a request that has lost blocks.
            num_exact_tokens: leading tokens that it had computed before it lost the first.
            evicted: logical indices, by KV cache group.
        """
        status = self._scheduler._req_status.get(request_id)
        if status is None:
            return
        self._scheduler._current_batch_jobs_to_flush |= status.transfer_jobs
        most = status.max_offload_tokens
        status.max_offload_tokens = (
            num_exact_tokens if most is None else min(most, num_exact_tokens)
        )
        chunk = self._scheduler.config.blocks_per_chunk
        groups = zip(self._scheduler.config.kv_group_configs, status.group_states, strict=True)
        for config, state in groups:
            for block in evicted.get(config.group_idx, ()):
                first = block // chunk * chunk
                places = range(first, min(first + chunk, len(state.block_ids)))
                for i in places:
                    state.block_ids[i] = 0  # as vLLM marks what left a sliding window

    def _max_loadable_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """As vLLM's, and no more than would be found on the device."""
        most, limit = self._most_of_vllm(request, num_computed_tokens), self._max_hit(request)
        if limit is None:
            return most
        room = max(0, limit - num_computed_tokens)
        return room if most is None else min(most, room)
