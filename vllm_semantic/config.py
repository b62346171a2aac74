"""Builds a policy from its name and options; an error names the flag, the value and what is
allowed."""

from __future__ import annotations

import importlib
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from .policies import POLICIES, KVPolicy
from .policies.check import (
    POLICY_ERRORS,
    PolicyError,
    build,
    check_class,
    check_judged,
    check_policy,
    is_built_in,
    reason,
)
from .policies.options import MAX_TOKENS, allowed, option_types, parse

POLICY_FLAG = "--kv-policy"
CONFIG_FLAG = "--kv-policy-config"

_all_options = reprlib.Repr()  # of a policy: more than its four entries
_all_options.maxdict = 16

SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp")
"""What may draft tokens under a policy. A model that drafts has layers of its own in the KV cache:
its blocks are the request's, and go with them."""

KV_CONNECTORS = ("OffloadingConnector", "ExampleConnector")
"""What ``--kv-transfer-config`` may name under a policy: it can be told which blocks are exact."""

KV_CACHE_DTYPES = (
    "auto",
    "bfloat16",
    "float16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_per_token_head",
    "int8_per_token_head",
)
"""What ``--kv-cache-dtype`` may be under a policy: a quantised cache has one scale for the keys of
a layer and one for its values, or one for each key and value of a head."""

WRAPPED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "XFORMERS")
"""vLLM's attention backends, and one of our own, that read a table without evicted blocks."""


def resolve_policy_class(name: object) -> type[KVPolicy]:
    """Find a policy by name, or by the qualified name of a class of one's own.

    Raises:
        ValueError: ``name`` is neither.
    """
    if isinstance(name, str):
        if name in POLICIES:
            return POLICIES[name]
        module_name, _, class_name = name.rpartition(".")
        if module_name:
            try:
                return check_class(_import(module_name, class_name))
            except PolicyError as error:
                raise ValueError(f"{POLICY_FLAG} {name!r} {error}") from error
    raise ValueError(
        f"{POLICY_FLAG} {name!r} is not known; allowed: {', '.join(POLICIES)}, "
        "or the qualified name of a KVPolicy class"
    )


def _import(module_name: str, class_name: str) -> object:
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except POLICY_ERRORS as error:  # a module is anybody's code
        why = reason(error, module_name)
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name)):
            why += "; its folder has to be in PYTHONPATH"
        raise PolicyError(f"cannot be imported: {why}") from error


def make_policy(
    name: object, options: Mapping[str, Any] | None = None, field: str = CONFIG_FLAG
) -> KVPolicy:
    """Build a policy from its name and options.

    Args:
        name: a key of :data:`~vllm_semantic.policies.POLICIES` or a qualified class name.
        options: the policy's options; missing ones take their defaults.
        field: where the options were given, for messages.

    Raises:
        ValueError: an unknown name or option, or a value out of range. The message names
            the flag, the value and what is allowed.
    """
    cls = resolve_policy_class(name)
    known = cls.options()
    options = {} if options is None else options
    values = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{field}.{key} is not an option of policy {name!r}; "
                f"allowed: {', '.join(known) or 'none'}"
            )
        values[key] = _option(cls, key, value, field)
    try:
        policy = build(cls, values)
        if not is_built_in(cls):
            check_policy(policy)
            check_judged(policy, values)
    except PolicyError as error:
        raise ValueError(f"{field} {_all_options.repr(values)}: policy {name!r} {error}") from error
    if policy.bounded and policy.recent_tokens == 0:
        raise ValueError(
            f"{field}.recent_tokens 0 would evict what was just written; "
            f"allowed: integers from 1 to {MAX_TOKENS}"
        )
    return policy


def _option(cls: type[KVPolicy], option: str, value: object, field: str) -> Any:
    annotation = option_types(cls)[option]
    try:
        return parse(option, annotation, value)
    except ValueError as error:
        what = "not a number of tokens" if option.endswith("_tokens") else "not known"
        raise ValueError(
            f"{field}.{option} {reprlib.repr(value)} is {what}; "
            f"allowed: {allowed(option, annotation)}"
        ) from error


def check_number(field: str, value: object, of: str = "tokens") -> None:
    """Refuse what is not a number of tokens, or of something else.

    Raises:
        ValueError: ``value`` is no integer from 0 to :data:`MAX_TOKENS`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        raise ValueError(
            f"{field} {reprlib.repr(value)} is not a number of {of}; "
            f"allowed: integers from 0 to {MAX_TOKENS}"
        )


def check_block_size(policy: KVPolicy, block_size: int, field: str = CONFIG_FLAG) -> None:
    """Refuse a block size that is coarser than a part of the budget.

    Sink tokens always round up to at least a block and are not checked.

    Raises:
        ValueError: rounding up to whole blocks would distort the budget.
    """
    if not policy.bounded:
        return
    for option, tokens in policy.parts().items():
        if option != "sink_tokens" and 0 < tokens < block_size:
            raise ValueError(
                f"--block-size {block_size} is too coarse for {field}.{option} {tokens}; "
                f"allowed: a block size of at most {tokens}, or {option} of at least {block_size}"
            )


def describe(policy: KVPolicy, block_size: int) -> str:
    """The policy and its budget, for the start log."""
    if not policy.bounded:
        return f"KV policy {policy.name}: every block is kept"
    parts = " + ".join(
        f"{option.removesuffix('_tokens')} {tokens}" for option, tokens in policy.parts().items()
    )
    total = policy.budget(block_size).total
    return (
        f"KV policy {policy.name}: {parts} = {policy.budget_tokens} tokens, "
        f"held as {total} blocks of {block_size} ({total * block_size} tokens) per request"
    )


def capacity(num_blocks: int, blocks_per_request: int) -> int:
    """How many requests of ``blocks_per_request`` blocks a pool of ``num_blocks`` holds."""
    return math.floor(max(num_blocks, 0) / blocks_per_request)
