"""The error of a request that may not have the policy that it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
