"""What the author of a policy can get wrong, found before it serves, by name.

A policy is anybody's code. Here its class, what its options make of it and what its score or rank
returns are held to what :class:`~.base.KVPolicy` promises, on a CPU and without a model; what can
only be seen later is guarded where the engine calls it.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import reprlib
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

import torch

from . import POLICIES
from .base import RECENT, SINK, KVPolicy
from .options import allowed, option_types, parse
from .view import BlockView

POLICY_ERRORS = (Exception, SystemExit)
"""What the code of a policy may raise that is no reason for an engine to end."""

RESERVED = ("name", "bounded", "choices", "pin", "pin_prompt_tokens", "max_request_tokens")
"""What no option can be called: read of the class, or of a request beside its options."""

MAX_QUERIES = 1024

ON_ANY_DEVICE = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, TypeError)
"""Mistakes in Python. What else a score raises on a CPU may be for want of a GPU."""


class PolicyError(ValueError):
    """Says what is wrong with a policy, and where."""


def is_built_in(cls: type[KVPolicy]) -> bool:
    """Whether the project's own tests have checked it."""
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
    """See that a score is only left unused where somebody asked for that.

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


# -- what it returns -------------------------------------------------------------------


def checked_scores(
    scores: object, num_layers: int, num_blocks: int, device: torch.device
) -> torch.Tensor:
    """What :meth:`~.base.KVPolicy.score` returned, in fp32.

    Raises:
        TypeError: it is no tensor, or none of real numbers.
        ValueError: it is not one score for each layer and block, or on another device.
    """
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"the scores are a {type(scores).__name__}; allowed: a torch.Tensor")
    if scores.shape != (num_layers, num_blocks):
        raise ValueError(
            f"the scores have the shape {list(scores.shape)}; "
            f"allowed: {[num_layers, num_blocks]}, one for each layer and full block"
        )
    if scores.is_complex() or scores.layout is not torch.strided:
        raise TypeError(
            f"the scores are {scores.dtype}, {scores.layout}; allowed: dense real numbers"
        )
    if scores.device != device:
        raise ValueError(f"the scores are on {scores.device}; allowed: {device}, as the keys")
    return scores.detach().float()


def checked_ranks(ranks: object, num_blocks: int) -> list[float]:
    """What :meth:`~.base.KVPolicy.rank` returned, as floats.

    Raises:
        TypeError: it is no sequence of real numbers; a tensor or an array of them is one.
        ValueError: it is not one for each candidate.
    """
    if hasattr(ranks, "tolist"):
        ranks = ranks.tolist()
    if not isinstance(ranks, Sequence) or isinstance(ranks, (str, bytes)):
        raise TypeError(f"the ranks are a {type(ranks).__name__}; allowed: a sequence of numbers")
    if len(ranks) != num_blocks:
        raise ValueError(f"there are {len(ranks)} ranks for {num_blocks} blocks")
    if wrong := [rank for rank in ranks if not isinstance(rank, Real)]:
        raise TypeError(f"{reprlib.repr(wrong[0])} is among the ranks; allowed: numbers")
    return [float(rank) for rank in ranks]


def try_out(policy: KVPolicy) -> None:
    """Let a policy judge made-up blocks, as the engine will.

    Raises:
        PolicyError: it raises, or returns something that is not one number for each block.
    """
    if policy._judge is None or not any(policy._selected_parts):
        return
    module = type(policy).__module__
    try:
        # Nothing of it shows in what anybody draws at random later.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            if policy.scores_blocks:
                for num_filled in (0, BLOCK_SIZE // 2):
                    _try_score(policy, num_filled)
            else:
                _try_rank(policy)
    except PolicyError:
        raise
    except POLICY_ERRORS as error:
        if torch.version.cuda is None or isinstance(error, ON_ANY_DEVICE):
            raise PolicyError(f"cannot {policy._judge}: {reason(error, module)}") from error


BLOCK_SIZE, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS = 16, 8, 4, 2, 2
"""Of the blocks that are made up."""


def num_judged_blocks(policy: KVPolicy, block_size: int) -> int:
    """As many blocks as a policy judges at least, one more than its budget; at most 64 to try."""
    return min(policy.budget(block_size).total + 1, 64)


def _held_blocks(policy: KVPolicy) -> list[int]:
    """As at an eviction point, one gone before."""
    return [0, *range(2, num_judged_blocks(policy, BLOCK_SIZE) + 1)]


def _try_score(policy: KVPolicy, num_filled: int) -> None:
    full = _held_blocks(policy)
    held = full + [full[-1] + 1] * bool(num_filled)
    num_tokens = (full[-1] + 1) * BLOCK_SIZE + num_filled
    generator = torch.Generator().manual_seed(0)
    kv_shape = (NUM_LAYERS, len(held), NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    keys, values = (torch.randn(kv_shape, generator=generator) for _ in range(2))
    query_shape = (NUM_LAYERS, min(policy.num_queries, num_tokens), NUM_HEADS, HEAD_SIZE)
    queries = torch.randn(query_shape, generator=generator)
    view = BlockView(queries, keys, values.clone, torch.tensor(held), num_tokens, HEAD_SIZE**-0.5)
    scores = checked_scores(policy.score(view), NUM_LAYERS, len(full), keys.device)
    if scores.isnan().all():
        raise PolicyError("cannot score: every score is NaN")


def _try_rank(policy: KVPolicy) -> None:
    kept = _held_blocks(policy)
    candidates = kept[1:-1]
    ranks = checked_ranks(policy.rank(candidates, (kept[-1] + 1) * BLOCK_SIZE, {}), len(candidates))
    if all(rank != rank for rank in ranks):
        raise PolicyError("cannot rank: every rank is NaN")
