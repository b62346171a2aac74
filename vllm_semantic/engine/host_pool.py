"""Which evicted blocks are kept in host memory, and where: the scheduler's side of recall."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from ..messages import BlockCopy, HostCopies, Owner

NOTHING: Mapping[int, int] = MappingProxyType({})


class Keeping(NamedTuple):
    """What became of a block that was to be kept."""

    copied: int = 0
    """1 if the next step copies it; 0 if it is here already, or has no place."""
    dropped: int = 0
    """Blocks of whatever requests that can no longer be recalled, for want of a slot."""


@dataclass
class _Kept:
    """What a slot holds, and for whom."""

    content: Hashable | None
    """What another request's equal block is known by; ``None``: nobody else has it."""
    owners: dict[Owner, int] = field(default_factory=dict)
    """The logical block that it is of each."""


class HostPool:
    """Slots of host memory for the evicted blocks of all requests, one block each.

    A block is full when it is evicted, so it never changes: one that is recalled keeps its slot,
    and evicting it again copies nothing. Where the pool is full, the blocks of requests that have
    ended go first, those that ended first before others. Then the block that was wanted the longest
    time ago goes, whoever's it is; its request can no longer recall it.

    Args:
        num_slots: blocks that fit.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        """By slot; what was wanted last comes last."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Slots that nobody has; what has been idle longest comes first."""
        self._slots: dict[Owner, dict[int, int]] = {}
        self._by_content: dict[Hashable, int] = {}
        self._out: dict[int, BlockCopy] = {}
        """By slot, what the next step copies to it."""
        self._back: dict[Owner, dict[int, BlockCopy]] = {}
        """By slot, what the next step copies from it."""

    @property
    def num_used(self) -> int:
        """Slots that hold a block."""
        return len(self._kept)

    def blocks_of(self, owner: Owner) -> Mapping[int, int]:
        """The slot of each block that an owner has here, by logical index; a view."""
        return self._slots.get(owner, NOTHING)

    def keep(self, owner: Owner, index: int, block_id: int, content: Hashable | None) -> Keeping:
        """Keep a block that is evicted; the next step copies it, unless it is here already.

        Args:
            owner: whose it is.
            index: its logical index.
            block_id: where it is on the device.
            content: equal for blocks of equal content, as vLLM's block hash is; ``None`` where
                there is none.
        """
        slots = self._slots.setdefault(owner, {})
        if index in slots:
            self._kept.move_to_end(slots[index])
            return Keeping()
        kept = Keeping()
        slot = None if content is None else self._by_content.get(content)
        if slot is None:
            kept = Keeping(copied=1, dropped=0 if self._free else self._drop())
            if not self._free:
                return Keeping(dropped=1)  # all that is here is being read
            slot = self._free.pop()
            self._kept[slot] = _Kept(content)
            self._out[slot] = BlockCopy(owner.group_id, block_id, slot)
            if content is not None:
                self._by_content[content] = slot
        self._idle.pop(slot, None)
        self._kept[slot].owners[owner] = index
        self._kept.move_to_end(slot)
        slots[index] = slot
        return kept

    def recall(self, owner: Owner, index: int, block_id: int) -> None:
        """Have the next step copy a block back to the device.

        Args:
            owner: whose it is; it has the block here.
            index: its logical index.
            block_id: where it goes.
        """
        slot = self._slots[owner][index]
        self._kept.move_to_end(slot)
        copy = BlockCopy(owner.group_id, block_id, slot)
        self._back.setdefault(owner, {})[slot] = copy

    def undo_recall(self, owner: Owner, index: int) -> None:
        """Take a recall back that no step has been told of."""
        del self._back[owner][self._slots[owner][index]]

    def take_copies(self) -> HostCopies | None:
        """Drain what the next step copies; ``None`` for nothing. Steps are worked off in order."""
        back = [copy for copies in self._back.values() for copy in copies.values()]
        copies = HostCopies(list(self._out.values()), back)
        self._out, self._back = {}, {}
        return copies if any(copies) else None

    def forget(self, owner: Owner) -> None:
        """Free what only this owner could recall.

        What has a content stays for as long as nothing else needs the slot: another request, or
        this one once it has been preempted, may evict the same.
        """
        self._back.pop(owner, None)
        for slot in self._slots.pop(owner, NOTHING).values():
            kept = self._kept[slot]
            del kept.owners[owner]
            if not kept.owners:
                self._idle[slot] = None
                if kept.content is None:
                    self._free_slot(slot)

    def forget_contents(self) -> None:
        """No block to come is equal to one that is here: the model may have changed."""
        self._by_content.clear()
        for slot, kept in list(self._kept.items()):
            kept.content = None
            if not kept.owners:
                self._free_slot(slot)

    def _drop(self) -> int:
        """Give up one block; how many requests had it."""
        if self._idle:
            self._free_slot(next(iter(self._idle)))
            return 0
        read = {slot for copies in self._back.values() for slot in copies}
        slot = next((slot for slot in self._kept if slot not in read), None)
        if slot is None:
            return 0
        owners = self._kept[slot].owners
        for owner, index in owners.items():
            del self._slots[owner][index]
        self._free_slot(slot)
        return len(owners)

    def _free_slot(self, slot: int) -> None:
        kept = self._kept.pop(slot)
        self._idle.pop(slot, None)
        if kept.content is not None:
            del self._by_content[kept.content]
        self._out.pop(slot, None)
        self._free.append(slot)
