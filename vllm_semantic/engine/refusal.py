"""The error of a request that may not have the policy that it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMValidationError

from ..served import REQUEST_KEY


class KVPolicyError(VLLMValidationError, ValueError):
    """A policy that a request may not have, or that stands where it is not read.

    vLLM answers its own validation errors with a 400 that names the parameter. Of any other
    ``ValueError`` its engine client makes a 500 without a word (``AsyncLLM.generate``).
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, parameter=REQUEST_KEY)

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def refusing() -> Iterator[None]:
    """Make a :class:`KVPolicyError` of what the checks of a request raise."""
    try:
        yield
    except KVPolicyError:
        raise
    except ValueError as error:
        raise KVPolicyError(str(error)) from error


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
