"""A KV cache group's evicted blocks: which are in host memory, and which are on their way back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable

from ..messages import Owner
from .host_pool import HostPool, Keeping


class Recalls:
    """One group's side of the host pool. Written by its :class:`~.manager.SemanticManager`.

    Args:
        host: the pool, of all groups.
        group_id: of the KV cache group.
    """

    def __init__(self, host: HostPool, group_id: int) -> None:
        self.host = host
        self.group_id = group_id
        self._back: defaultdict[str, dict[int, int]] = defaultdict(dict)
        """By request and logical index, the block that the next step copies to."""

    def away(self, request_id: str, held: Collection[int]) -> dict[int, int]:
        """The slots of a request's blocks that are in host memory only, by logical index.

        Args:
            request_id: the request.
            held: logical indices of its full blocks on the device.
        """
        slots = self.host.blocks_of(Owner(self.group_id, request_id))
        return {i: slots[i] for i in sorted(slots.keys() - set(held))}

    def keep(self, request_id: str, index: int, block_id: int, content: Hashable | None) -> Keeping:
        """Keep a block that is evicted, see :meth:`HostPool.keep`."""
        return self.host.keep(Owner(self.group_id, request_id), index, block_id, content)

    def bring_back(self, request_id: str, index: int, block_id: int) -> None:
        """Have the next step copy a block to a place on the device."""
        self._back[request_id][index] = block_id
        self.host.recall(Owner(self.group_id, request_id), index, block_id)

    def undo(self, request_id: str, index: int) -> bool:
        """Take back what no worker has been told of; whether there was anything.

        Scheduling ahead, two eviction points of a request may be settled in one step.
        """
        if index not in self._back.get(request_id, ()):
            return False
        del self._back[request_id][index]
        self.host.undo_recall(Owner(self.group_id, request_id), index)
        return True

    def take(self) -> dict[str, dict[int, int]]:
        """Drain what comes back with the next step, for the workers: ids by logical index."""
        back, self._back = self._back, defaultdict(dict)
        return {of: dict(sorted(places.items())) for of, places in back.items() if places}

    def forget(self, request_id: str) -> None:
        """Drop the state of a request that finished, was aborted or preempted."""
        self._back.pop(request_id, None)
        self.host.forget(Owner(self.group_id, request_id))
