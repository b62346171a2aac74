"""Options by the annotation of their field: which values it allows, from Python or from JSON."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
from collections.abc import Sequence
from functools import cache
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .base import KVPolicy

MAX_TOKENS = 2**31 - 1
"""vLLM counts positions in int32."""

SCALARS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true, false"),
    int: ((int,), "integers"),
    float: ((int, float), "numbers"),
    str: ((str,), "text"),
    NoneType: ((NoneType,), "null"),
}
"""By annotation: the types of its values, and these in words."""

ANNOTATIONS = "bool, int, float, str, None, Literal, Enum, and tuple and Union of these"


@cache
def option_types(cls: type[KVPolicy]) -> dict[str, Any]:
    """The options of a policy and their annotations, those that are text evaluated.

    An option with :attr:`~.base.KVPolicy.choices` has the ``Literal`` of them.

    Raises:
        Exception: whatever evaluating an annotation raises.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls) if cls.bounded else ():
        if field.name in cls.choices:
            found[field.name] = Literal[tuple(cls.choices[field.name])]
            continue
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        holder = SimpleNamespace(__annotations__={field.name: field.type})
        names = vars(sys.modules[owner.__module__])
        found[field.name] = get_type_hints(holder, globalns=names, localns=dict(vars(owner)))[
            field.name
        ]
    return found


def allowed(option: str, annotation: Any) -> str:
    """The values that an annotation allows, in words.

    Raises:
        TypeError: it is none of :data:`ANNOTATIONS`.
    """
    if option.endswith("_tokens"):
        if annotation is not int:
            raise TypeError("a part of the budget is annotated int")
        return f"integers from 0 to {MAX_TOKENS}"
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        return SCALARS[annotation][1]
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, UnionType):
        return " or ".join(allowed("", member) for member in args)
    if origin is tuple and args:
        members = [allowed("", member) for member in args if member is not ...]
        return f"a list of {', '.join(members)}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ", ".join(annotation.__members__)
    raise TypeError(f"{annotation!r} is none of {ANNOTATIONS}")


def parse(option: str, annotation: Any, value: object) -> Any:
    """The value of an option as the policy wants it, from what JSON makes of it.

    Args:
        option: its name; ``*_tokens`` counts tokens.
        annotation: one that :func:`allowed` knows.
        value: a list for a tuple, the name or the value of a member for an ``Enum``.

    Raises:
        ValueError: it is not allowed.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        types, _ = SCALARS[annotation]
        counts_tokens = option.endswith("_tokens")
        if (
            type(value) in types  # no bool as a number
            and value == value  # no NaN
            and (not counts_tokens or 0 <= value <= MAX_TOKENS)  # type: ignore[operator]
        ):
            return value
    elif origin is Literal:
        for member in args:
            if type(member) is type(value) and member == value:
                return member
    elif origin in (Union, UnionType):
        for member in args:
            try:
                return parse("", member, value)
            except ValueError:
                continue
    elif origin is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            members = args[:1] * len(value) if args[1:] == (...,) else args
            if len(members) == len(value):
                return tuple(parse("", *pair) for pair in zip(members, value, strict=True))
    elif isinstance(value, annotation):
        return value
    else:
        for name, member in annotation.__members__.items():
            if type(value) in (str, type(member.value)) and value in (name, member.value):
                return member
    raise ValueError(f"{value!r} is not allowed")


def to_json(value: object) -> Any:
    """The value of an option in types that JSON and msgpack have; :func:`parse` reads it back."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple):
        return [to_json(member) for member in value]
    return value
