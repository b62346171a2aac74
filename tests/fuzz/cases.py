"""Random requests by the OpenAPI document of a server, some with a policy of their own."""

from __future__ import annotations

import contextlib
import copy
import json
import time
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.generation import GenerationMode

from .. import policy_requests

SERVABLE: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 24),
    "max_completion_tokens": (1, 24),
    "max_output_tokens": (1, 24),
    "min_tokens": (0, 4),
    "n": (1, 3),
    "top_logprobs": (0, 5),
    "prompt_logprobs": (0, 5),
    "temperature": (0, 2),
    "top_p": (0.1, 1),
    "top_k": (1, 50),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.5, 2),
    "thinking_token_budget": (1, 24),
}
"""Ranges that the document does not tell: without them hardly a request would be served."""


PLAIN: dict[str, Any] = {
    "prompt": "It was a bright cold day in April, " * 20,
    "messages": [{"role": "user", "content": "Tell me about the sea. " * 20}],
    "input": "Tell me about the sea.",
    "max_tokens": 16,
    "max_output_tokens": 16,
}
"""A body that is served."""


def operations(
    document: dict[str, Any], model: str
) -> Iterator[tuple[str, st.SearchStrategy[Case]]]:
    """The operations that take a body, and requests of each.

    A quarter of them is by the document, a quarter ``PLAIN`` with a few fields by the document, a
    quarter the same with a policy in ``vllm_xargs``, and a quarter breaks the document.

    Args:
        document: OpenAPI.
        model: served name.
    """
    document = tame(document, model)
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        if not operation.body:
            continue
        declared = fields_of(operation.definition.raw, document)
        good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        bad = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        asked = policy_requests.requests | policy_requests.requests.map(json.dumps)
        base = {name: value for name, value in PLAIN.items() if name in declared}
        kept = st.sets(st.sampled_from(declared), max_size=6)
        served = st.builds(plain, good, st.just({"model": model} | base), kept)
        yield operation.label, st.one_of(good, served, st.builds(with_policy, served, asked), bad)


def fields_of(operation: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """The names that a JSON body of an operation declares, in all its forms."""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    names: set[str] = set()
    for form in schema.get("anyOf", [schema]):
        name = form["$ref"].rsplit("/", 1)[1]
        names |= document["components"]["schemas"][name]["properties"].keys()
    return sorted(names)


def tame(document: dict[str, Any], model: str) -> dict[str, Any]:
    """A copy that names the model and the ranges in ``SERVABLE``."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties:
            properties["model"] = {"enum": [model]}
        for name, (low, high) in SERVABLE.items():
            declared = properties.get(name, {})
            for option in [declared, *declared.get("anyOf", [])]:
                if option.get("type") in ("integer", "number"):
                    properties[name] = {"type": option["type"], "minimum": low, "maximum": high}
    return document


def plain(case: Case, base: dict[str, Any], kept: set[str]) -> Case:
    """A plain body and the fields of a random one that are named in ``kept``."""
    if isinstance(case.body, dict):
        case.body = {name: case.body[name] for name in kept & case.body.keys()} | base
    return case


def with_policy(case: Case, asked: Any) -> Case:
    if isinstance(case.body, dict):
        case.body = case.body | {"vllm_xargs": {"kv_policy": asked}}
    return case


def has_policy(case: Case) -> bool:
    xargs = case.body.get("vllm_xargs") if isinstance(case.body, dict) else None
    return isinstance(xargs, dict) and "kv_policy" in xargs


def each_of(
    cases: st.SearchStrategy[Case],
    do: Callable[[Case], None],
    *,
    examples: int,
    until: float = float("inf"),
    first: int = 0,
) -> None:
    """Draw requests and do something with each, the same ones each time.

    Args:
        cases: to draw from.
        do: is called with each.
        examples: how many.
        until: no more after it, of ``time.monotonic()``.
        first: seed.
    """

    @seed(first)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def one(case: Case) -> None:
        if time.monotonic() > until:
            raise unittest.SkipTest  # the one exception that hypothesis hands on as it is
        do(case)

    with contextlib.suppress(unittest.SkipTest):
        one()
