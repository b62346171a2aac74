"""Streaming-input sessions: prompts that come in chunks, all under one policy."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..frontend import checked
from ..served import REQUEST_KEY
from .refusal import KVPolicyError, refusing

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.protocol import StreamingInput


async def under_one_policy(
    chunks: AsyncGenerator[StreamingInput, None],
    sampling_params: SamplingParams,
    vllm_config: VllmConfig,
) -> AsyncGenerator[StreamingInput, None]:
    """A session's chunks, each asking for the policy of the session.

    That is the one that the session's parameters ask for, or else those of its first chunk. A
    chunk with parameters of its own that names no policy stays under it.

    Args:
        chunks: of prompt; where they have sampling parameters, these replace the session's.
        sampling_params: of the session.
        vllm_config: of an engine with a policy.

    Raises:
        KVPolicyError: a chunk asks for another policy than the session has.
    """
    of_session = asked_by(sampling_params)
    first = True
    async for chunk in chunks:
        if chunk.sampling_params is not None:
            asked = asked_by(chunk.sampling_params)
            if first and of_session is None:
                of_session = asked
            elif asked is None and of_session is not None:
                chunk = replace(
                    chunk, sampling_params=with_policy(chunk.sampling_params, of_session)
                )
            elif asked is not None:
                _check_alike(asked, of_session, vllm_config)
        first = False
        yield chunk


def asked_by(params: SamplingParams) -> Any:
    """What sampling parameters ask for; ``None``: nothing."""
    return (params.extra_args or {}).get(REQUEST_KEY)


def with_policy(params: SamplingParams, asked: Any) -> SamplingParams:
    """The same sampling parameters, with a policy."""
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), REQUEST_KEY: asked}
    return params


def _check_alike(asked: Any, of_session: Any, vllm_config: VllmConfig) -> None:
    """Raises: KVPolicyError, the two are not the same policy."""

    def policy(asked: Any) -> Any:
        # Counted as a session is: it may grow to what the model takes.
        extra_args = {REQUEST_KEY: {} if asked is None else asked}
        max_model_len = vllm_config.model_config.max_model_len
        return checked(extra_args, vllm_config, max_model_len, 0)[REQUEST_KEY]

    with refusing():
        here, before = policy(asked), policy(of_session)
    if here != before:
        raise KVPolicyError(
            f"{REQUEST_KEY} {here} in a later chunk of a session; allowed: {before}, "
            "the policy that it began with"
        )
