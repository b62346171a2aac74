"""Requests that ask for a policy of their own, where vLLM checks the rest of a request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from .served import (
    CONFIG_KEY,
    PIN,
    PIN_SYSTEM,
    PIN_TOKENS,
    REQUEST_KEY,
    ServedPolicies,
    has_policy,
    request_options,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SYSTEM_ROLES = ("system", "developer")

CONTENT = frozenset({"metadata", "response_format", "structured_outputs", "text", "output_config"})
"""Fields of a request whose keys are the client's own: no policy is looked for in them."""
MAX_DEPTH = 4
"""How many levels of nested objects are searched for a policy."""


def asks_for_policy(extra_args: Mapping[str, Any] | None, vllm_config: VllmConfig) -> bool:
    """Whether a request asks for a policy of its own, of an engine that has one at all.

    Args:
        extra_args: ``SamplingParams.extra_args``, or ``vllm_xargs``.
        vllm_config: of the engine.

    Raises:
        ValueError: it asks for one where it is not read.
    """
    if not extra_args or not has_policy(vllm_config):
        return False
    check_places(extra_args, (REQUEST_KEY,), "extra_args")
    return REQUEST_KEY in extra_args


def check_places(asked: Mapping[str, Any], place: tuple[str, ...] | None, reader: str) -> None:
    """Refuse a policy that would be ignored where it stands.

    Args:
        asked: a request, or a part of it.
        place: the path at which a policy is read; ``None``: nowhere.
        reader: what reads it, for the message.

    Raises:
        ValueError: names where it stands and where it is read.
    """
    for path in _policies_in(asked, ()):
        if path != place:
            allowed = ".".join(place) if place else f"none, the server's own {REQUEST_KEY} holds"
            raise ValueError(f"{'.'.join(path)} is not read by {reader}; allowed: {allowed}")


def _policies_in(asked: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Where something named like a policy stands, in objects that vLLM or a plugin might read."""
    for name, value in asked.items():
        if value is not None and str(name).startswith(REQUEST_KEY):
            yield (*path, str(name))
        elif isinstance(value, Mapping) and name not in CONTENT and len(path) < MAX_DEPTH:
            yield from _policies_in(value, (*path, str(name)))


def checked(
    extra_args: Mapping[str, Any],
    vllm_config: VllmConfig,
    num_prompt_tokens: int,
    max_tokens: int,
) -> dict[str, Any]:
    """A request's extra arguments, with all of the policy it gets in place of what it asked for.

    Args:
        extra_args: ``SamplingParams.extra_args``, with :data:`~.served.REQUEST_KEY`.
        vllm_config: of an engine with a policy.
        num_prompt_tokens: of the request.
        max_tokens: the most it may generate.

    Raises:
        ValueError: see :meth:`~.served.ServedPolicies.choose`.
    """
    config: Any = vllm_config.additional_config  # vLLM takes anything that hashes
    served = ServedPolicies.from_config(config[CONFIG_KEY])
    block_size = vllm_config.cache_config.block_size
    policy = served.choose(extra_args[REQUEST_KEY], block_size, num_prompt_tokens, max_tokens)
    return {**extra_args, REQUEST_KEY: served.to_request(policy)}


def system_chats(
    extra_args: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """Two chats that show where a request's system message lies in its prompt.

    Args:
        extra_args: of the request, with :data:`~.served.REQUEST_KEY`.
        messages: of its chat.

    Returns:
        One with the same system message, and one with a longer one: their prompts differ from
        where the message ends. Empty if the request does not ask for that, or begins with no
        such message.

    Raises:
        ValueError: see :func:`~.served.request_options`.
    """
    if PIN not in request_options(extra_args[REQUEST_KEY]):
        return []
    system = list(takewhile(lambda message: message.get("role") in SYSTEM_ROLES, messages))
    if not system:
        return []
    content = system[-1].get("content") or ""
    more: Any = " -" if isinstance(content, str) else [{"type": "text", "text": " -"}]
    longer = [*system[:-1], {**system[-1], "content": content + more}]
    return [[*of, {"role": "user", "content": "-"}] for of in (system, longer)]


def with_pinned(
    extra_args: Mapping[str, Any],
    prompt: Sequence[int],
    system_prompt: Sequence[int],
    longer_prompt: Sequence[int],
) -> dict[str, Any]:
    """Extra arguments that pin tokens in place of a system message.

    Args:
        extra_args: of a request that wants its system message pinned.
        prompt: its token ids.
        system_prompt: those of the first of :func:`system_chats`.
        longer_prompt: those of the second.

    Returns:
        The policy as JSON text, which ``vllm_xargs`` takes.

    Raises:
        ValueError: the chat template puts the message elsewhere.
    """
    options = request_options(extra_args[REQUEST_KEY])
    del options[PIN]
    num_pinned = _num_alike(prompt, system_prompt)
    # The last token of a message may be another one where something else follows.
    if num_pinned < _num_alike(system_prompt, longer_prompt) - 1:
        raise ValueError(
            f"{REQUEST_KEY}.{PIN} {PIN_SYSTEM!r}: the chat template does not put the system "
            f"message first, and only the beginning of a prompt can be pinned; allowed here: "
            f"{REQUEST_KEY}.{PIN_TOKENS}"
        )
    options[PIN_TOKENS] = max(num_pinned, options.get(PIN_TOKENS, 0))
    return {**extra_args, REQUEST_KEY: json.dumps(options)}


def _num_alike(prompt: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two prompts have in common."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False))
    return sum(1 for _ in alike)
