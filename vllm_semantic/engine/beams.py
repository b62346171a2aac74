"""Beam searches under a policy of their request's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

SearchT = TypeVar("SearchT")


class BeamEngine:
    """vLLM's engine or its client, as a beam search sees it: each beam gets the search's policy.

    A search builds sampling parameters of its own, in more than one place, and knows nothing of
    extra arguments. Here all of its beams pass, whatever built them.
    """

    def __init__(self, engine: Any, extra_args: Mapping[str, Any]) -> None:
        self._engine = engine
        self._extra_args = dict(extra_args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        """``AsyncLLM.generate`` of a beam: the online search."""
        return self._engine.generate(prompt, self._of_search(sampling_params), *args, **kwargs)

    def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``LLMEngine.add_request`` of a beam: the offline search."""
        return self._engine.add_request(
            request_id, prompt, self._of_search(params), *args, **kwargs
        )

    def _of_search(self, params: Any) -> Any:
        params.extra_args = {**(params.extra_args or {}), **self._extra_args}
        return params


def searching(search: SearchT, engine: str, extra_args: Mapping[str, Any]) -> SearchT:
    """A copy of what runs a beam search, whose engine gives each beam the search's policy.

    Args:
        search: a serving class, or an ``LLM``; it stays as it is.
        engine: the attribute that holds its engine.
        extra_args: what each beam gets.
    """
    copied = copy.copy(search)
    setattr(copied, engine, BeamEngine(getattr(search, engine), extra_args))
    return copied
