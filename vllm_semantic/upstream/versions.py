"""Which versions of vLLM the plugin runs on, and what they do differently."""

from __future__ import annotations

import os
from typing import Any

from ..config import POLICY_FLAG
from ..served import REQUEST_KEY

SUPPORTED_VLLM = "0.32"

ALLOW_UNTESTED = "VLLM_SEMANTIC_ALLOW_UNTESTED"
"""An environment variable: 1 lets a policy run on another vLLM."""


def is_supported(version: str) -> bool:
    """Whether a version of vLLM is one that the plugin was written for."""
    return version.startswith(f"{SUPPORTED_VLLM}.")


def check_vllm_version() -> None:
    """Refuse a vLLM whose internals the plugin was not written for, or warn of it.

    Raises:
        ValueError: vLLM is not of the supported minor version, and :data:`ALLOW_UNTESTED` is not
            set to 1.
    """
    from vllm import __version__
    from vllm.logger import init_logger

    if is_supported(__version__):
        return
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise ValueError(
            f"{POLICY_FLAG} does not support vLLM {__version__}; allowed: {SUPPORTED_VLLM}.*, "
            f"or {ALLOW_UNTESTED}=1 to try it untested"
        )
    from .signatures import signatures

    changed = [f"{name} {problem}" for name, problem in signatures() if problem is not None]
    init_logger(f"vllm.{__name__}").warning(
        "%s has not been tested with vLLM %s, only with %s.*; of vLLM's methods that it stands on, "
        "these have changed: %s",
        POLICY_FLAG,
        __version__,
        SUPPORTED_VLLM,
        "; ".join(changed) or "none",
    )


def end_with_error(errors: Any, request_id: str) -> None:
    """Have a scheduler end a request with an error in its next step.

    Args:
        errors: its ``grammar_compile_error_reqs``: a set, which says no more, or since 0.33 what
            to answer by request.
        request_id: a request that waits.
    """
    if isinstance(errors, set):
        errors.add(request_id)
        return
    from vllm.outputs import RequestError

    message = f"{REQUEST_KEY}: not what this server allows; its log says why"
    errors[request_id] = RequestError("validation_error", message)
