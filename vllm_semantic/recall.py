"""Options of recall: how much host memory evicted blocks have, and how many come back at a time."""

from __future__ import annotations

import math
import reprlib

from .config import CONFIG_FLAG, check_number

RECALL_GIB = "recall_gib"
RECALL_BLOCKS = "recall_blocks"
GIB = 1 << 30


def check_recall_gib(value: object) -> float:
    """Refuse what is no amount of memory.

    Raises:
        ValueError: names the flag, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(
            f"{CONFIG_FLAG}.{RECALL_GIB} {reprlib.repr(value)} is not an amount of memory in GiB; "
            "allowed: numbers from 0, which keeps no evicted block"
        )
    return float(value)


def check_recall_blocks(value: object, recall_gib: float) -> int:
    """Refuse what is no number of blocks, or blocks that no host memory keeps.

    Raises:
        ValueError: names the flag, the value and what is allowed.
    """
    flag = f"{CONFIG_FLAG}.{RECALL_BLOCKS}"
    check_number(flag, value, "blocks")
    assert isinstance(value, int)
    if value and not recall_gib:
        raise ValueError(f"{flag} {value} needs {CONFIG_FLAG}.{RECALL_GIB} above 0; allowed: 0")
    return value


def host_slots(recall_gib: float, block_bytes: int) -> int:
    """Blocks that fit into the host memory that there is for them.

    Args:
        recall_gib: of all tensor-parallel ranks together; 0 for none.
        block_bytes: of a block in all layers of a group, of all ranks together.

    Raises:
        ValueError: none fits; names the flag and what is allowed.
    """
    num_slots = int(recall_gib * GIB // block_bytes)
    if recall_gib and not num_slots:
        raise ValueError(
            f"{CONFIG_FLAG}.{RECALL_GIB} {recall_gib:g} is too little for one block of "
            f"{block_bytes} bytes; allowed: 0, or from {block_bytes / GIB:.2g}"
        )
    return num_slots
