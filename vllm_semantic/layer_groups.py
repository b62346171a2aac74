"""Groups of attention layers that evict for themselves: how many, which layer is in which, and how
much more the deeper ones keep."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

from .config import CONFIG_FLAG
from .policies.base import KVPolicy
from .policies.options import MAX_TOKENS

LAYER_GROUPS = "layer_groups"
LAYER_SKEW = "layer_skew_tokens"
_FLAG = f"{CONFIG_FLAG}.{LAYER_GROUPS}"
_SKEW_FLAG = f"{CONFIG_FLAG}.{LAYER_SKEW}"


def check_layer_groups(value: object, num_layers: int | None = None) -> int:
    """Refuse a number of groups that cannot be equal shares of the layers.

    Args:
        value: what was asked for.
        num_layers: layers under the policy; ``None`` before that is known.

    Raises:
        ValueError: names the flag, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{_FLAG} {reprlib.repr(value)} is not a number of groups; "
            "allowed: integers from 1, of which the model's full-attention layers are a multiple"
        )
    if num_layers is not None and value > 1 and (num_layers < value or num_layers % value):
        shares = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ValueError(
            f"{_FLAG} {value} does not divide the {num_layers} full-attention layers of the model "
            f"into equal shares; allowed: {', '.join(map(str, shares)) or 1}"
        )
    return value


def check_layer_skew(value: object, num_groups: int, policy: KVPolicy) -> int:
    """Refuse a skew that the groups, or the policy's budget, have no room for.

    Args:
        value: what was asked for.
        num_groups: of layers.
        policy: the server's own.

    Raises:
        ValueError: names the flag, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_TOKENS:
        raise ValueError(
            f"{_SKEW_FLAG} {reprlib.repr(value)} is not a number of tokens; "
            f"allowed: integers from -{MAX_TOKENS} to {MAX_TOKENS}"
        )
    if value and num_groups == 1:
        raise ValueError(f"{_SKEW_FLAG} {value} needs {_FLAG} of at least 2; allowed: 0")
    if abs(value) > policy.selected_tokens:
        most = policy.selected_tokens
        raise ValueError(
            f"{_SKEW_FLAG} {value} is more than the {most} tokens that policy {policy.name!r} "
            f"keeps by score; allowed: -{most} to {most}"
        )
    return value


def skew_blocks(group: int, num_groups: int, skew_tokens: int, block_size: int) -> int:
    """Blocks that a group of layers keeps beyond the policy's budget.

    The last group keeps ``skew_tokens`` more, the first as many fewer, those between what lies on
    the line; over all groups they add up to 0.
    """
    last = num_groups - 1
    return round(skew_tokens * (2 * group - last) / (last * block_size)) if last else 0


def split_layers(page_sizes: Mapping[str, int], num_groups: int) -> dict[str, int]:
    """The group of each layer: contiguous shares, equal in layers.

    vLLM's hybrid KV cache manager serves groups out of one pool if a block of each takes the same
    memory (``get_kv_cache_groups``, vllm/v1/core/kv_cache_utils.py).

    Args:
        page_sizes: bytes of a block by name, of the layers under the policy in the model's order.
        num_groups: how many.

    Raises:
        ValueError: the layers cannot be split into so many; names the flag and what is allowed.
    """
    check_layer_groups(num_groups, len(page_sizes))
    if num_groups > 1 and len(set(page_sizes.values())) > 1:
        raise ValueError(
            f"{_FLAG} {num_groups} needs full-attention layers whose blocks take the same memory; "
            f"this model's take {', '.join(map(str, sorted(set(page_sizes.values()))))} bytes; "
            "allowed: 1"
        )
    share = len(page_sizes) // num_groups
    return {name: i // share for i, name in enumerate(page_sizes)}
