"""Checks a policy's class and options before it serves; an error names the attribute and its fix.

A policy may be anybody's code, so its class, and each policy that is built from options, is held to
the rules of :class:`~.base.KVPolicy`. :mod:`~.trial` checks what its score or rank returns.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import reprlib
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from . import POLICIES
from .base import RECENT, SINK, KVPolicy
from .options import allowed, option_types, parse

POLICY_ERRORS = (Exception, SystemExit)
"""What a policy's code may raise without ending the engine."""

RESERVED = (
    "name",
    "bounded",
    "choices",
    "pin",
    "pin_prompt_tokens",
    "max_request_tokens",
    "layer_groups",
    "layer_skew_tokens",
    "recall_gib",
    "recall_blocks",
)
"""Names that no option may have: those of a policy's class variables, and of what a request or the
server sets beside the options."""

MAX_QUERIES = 1024
"""The largest ``num_queries`` of a policy."""


class PolicyError(ValueError):
    """Says what is wrong with a policy, and where."""


def is_built_in(cls: type[KVPolicy]) -> bool:
    """Whether a class is one of :data:`~.POLICIES`, which the project's own tests check."""
    return cls in POLICIES.values()


def reason(error: BaseException, module: str) -> str:
    """An exception in one line, with the last line of ``module`` that it came through."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_globals.get("__name__") == module]
    where = f" (line {lines[-1]} of {module})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


# -- the class -------------------------------------------------------------------------


def check_class(cls: object) -> type[KVPolicy]:
    """Hold a class to what :class:`~.base.KVPolicy` says of its subclasses.

    Raises:
        PolicyError: it is none, or one whose declarations would be ignored or misread.
    """
    if not isinstance(cls, type) or not issubclass(cls, KVPolicy):
        raise PolicyError("is not a subclass of KVPolicy")
    if not is_built_in(cls):
        _check_own_class(cls)
    return cls


@cache
def _check_own_class(cls: type[KVPolicy]) -> None:
    if inspect.isabstract(cls):
        raise PolicyError(f"is abstract: {', '.join(sorted(cls.__abstractmethods__))} is missing")
    _check_decorators(cls)
    _check_attributes(cls)
    _check_options(cls)
    _check_judge(cls)
    check_policy(build(cls, {}))


def _check_decorators(cls: type[KVPolicy]) -> None:
    decorator = "@dataclass(frozen=True, kw_only=True)"
    for base in cls.__mro__:
        parameters = vars(base).get("__dataclass_params__")
        own = [n for n, a in inspect.get_annotations(base).items() if "ClassVar" not in str(a)]
        if parameters is None and own:
            raise PolicyError(
                f"{base.__name__} has no {decorator}, so {', '.join(own)} would be ignored"
            )
        if parameters is not None and not parameters.eq:
            raise PolicyError(f"{base.__name__} has eq=False; allowed: {decorator}")


def _check_attributes(cls: type[KVPolicy]) -> None:
    name = inspect.getattr_static(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise PolicyError(
            f"has the name {name!r}; allowed: text, as in {_class_variable('name', 'str', 'mine')}"
        )
    if name in POLICIES:
        raise PolicyError(
            f"has the name {name!r} of another policy; allowed: one of its own, "
            f"as in {_class_variable('name', 'str', 'mine')}"
        )
    if not isinstance(inspect.getattr_static(cls, "bounded"), bool):
        raise PolicyError(f"has bounded = {cls.bounded!r}; allowed: True, False")
    fields = {field.name for field in dataclasses.fields(cls)}
    choices = inspect.getattr_static(cls, "choices")
    if not isinstance(choices, Mapping) or not all(
        option in fields
        and isinstance(words, Sequence)
        and not isinstance(words, str)
        and words
        and all(isinstance(word, str) for word in words)
        for option, words in choices.items()
    ):
        raise PolicyError(f"has choices = {choices!r}; allowed: a tuple of words by option")
    for base in cls.__mro__:
        annotated = inspect.get_annotations(base)
        for attribute, value in vars(base).items():
            # Where a dataclass declares a field, the class has its default.
            if (
                attribute.endswith("_tokens")
                and isinstance(value, (int, float))
                and attribute not in annotated
            ):
                raise PolicyError(_ignored(base, attribute, value))


def _check_options(cls: type[KVPolicy]) -> None:
    for field in dataclasses.fields(cls):
        option, missing = field.name, dataclasses.MISSING
        if option in RESERVED:
            raise PolicyError(
                f"has an option {option}, which means something else; allowed: another name, or "
                f"a class variable, as in {_class_variable(option, '...', ...)}"
            )
        if not field.init or not field.compare:
            raise PolicyError(
                f"has an option {option} with init=False or compare=False; allowed: without"
            )
        if field.default is missing and field.default_factory is missing:
            raise PolicyError(f"has an option {option} without a default")
        of_class = inspect.getattr_static(cls, option, field.default)
        if of_class is not field.default and not inspect.ismemberdescriptor(of_class):
            raise PolicyError(_ignored(cls, option, of_class))
    try:
        options, types = cls.options(), option_types(cls)
        words = {option: allowed(option, types[option]) for option in options}
    except POLICY_ERRORS as error:
        raise PolicyError(f"has options that cannot be read: {reason(error, '')}") from error
    for option, default in options.items():
        try:
            parse(option, types[option], default)
        except ValueError as error:
            raise PolicyError(
                f"has the default {option} = {default!r}; allowed: {words[option]}"
            ) from error


def _parts_by_score(cls: type[KVPolicy]) -> list[str]:
    parts = [option for option in cls.options() if option.endswith("_tokens")]
    return [option for option in parts if option not in (SINK, RECENT)]


def _check_judge(cls: type[KVPolicy]) -> None:
    by_score = _parts_by_score(cls)
    if cls._judge is None and by_score:
        raise PolicyError(
            f"keeps {', '.join(by_score)} by score and overrides neither score nor rank"
        )
    if cls._judge is not None and not by_score:
        why = (
            f"no option beside {SINK} and {RECENT} ends in _tokens"
            if cls.bounded
            else "bounded is False"
        )
        raise PolicyError(f"overrides {cls._judge}, which would never be called: {why}")


def _class_variable(name: str, annotation: str, value: object) -> str:
    return f"{name}: ClassVar[{annotation}] = {'...' if value is ... else repr(value)}"


def _ignored(cls: type, option: str, value: object) -> str:
    return (
        f"{cls.__name__} sets {option} = {reprlib.repr(value)}, which would be ignored; "
        f"allowed: a field with its type, as in {option}: int = 64"
    )


# -- one policy ------------------------------------------------------------------------


def build(cls: type[KVPolicy], options: Mapping[str, Any]) -> KVPolicy:
    """A policy of these options, whatever code its construction runs.

    Raises:
        PolicyError: it raises, or makes something else of an option.
    """
    try:
        policy = cls(**options)
        changed = [option for option in options if getattr(policy, option) != options[option]]
    except POLICY_ERRORS as error:
        raise PolicyError(f"cannot be made: {reason(error, cls.__module__)}") from error
    if changed:
        raise PolicyError(f"makes something else of {', '.join(changed)}")
    return policy


def check_policy(policy: KVPolicy) -> None:
    """Hold what the options of a policy make of it to what the engine counts on.

    Raises:
        PolicyError: a value of another type or out of range, or what cannot be sent to a worker.
    """
    cls = type(policy)
    try:
        for option, annotation in option_types(cls).items():
            value = getattr(policy, option)
            try:
                parse(option, annotation, value)
            except ValueError as error:
                raise PolicyError(
                    f"has {option} = {reprlib.repr(value)}; allowed: {allowed(option, annotation)}"
                ) from error
        num_queries, decay = policy.num_queries, policy.decay
        if type(num_queries) is not int or not 1 <= num_queries <= MAX_QUERIES:
            raise PolicyError(
                f"has num_queries = {num_queries!r}; allowed: integers from 1 to {MAX_QUERIES}"
            )
        if type(decay) not in (int, float) or not 0 <= decay <= 1:
            raise PolicyError(f"has decay = {decay!r}; allowed: numbers from 0 to 1")
        selected = sum(policy._selected_parts)
        if "selected_tokens" not in cls.options() and policy.selected_tokens != selected:
            raise PolicyError(
                f"has selected_tokens = {policy.selected_tokens!r}, and options that end in "
                f"_tokens beside {SINK} and {RECENT} of {selected}; allowed: the same"
            )
        repr(policy)
        copy = pickle.loads(pickle.dumps(policy))
        if copy != policy or hash(copy) != hash(policy):
            raise PolicyError("is not equal to a copy of it, as workers get it")
    except PolicyError:
        raise
    except POLICY_ERRORS as error:
        raise PolicyError(f"cannot be used: {reason(error, cls.__module__)}") from error


def check_judged(policy: KVPolicy, options: Mapping[str, Any]) -> None:
    """Refuse a policy that keeps nothing by score, unless its options ask for that.

    Args:
        policy: made with these options.
        options: those that were given.

    Raises:
        PolicyError: nothing is kept by score, by default.
    """
    by_score = _parts_by_score(type(policy))
    if by_score and not any(policy._selected_parts) and not options.keys() & set(by_score):
        raise PolicyError(
            f"overrides {policy._judge}, which would never be called: "
            f"{', '.join(by_score)} is 0 by default"
        )
