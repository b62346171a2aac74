"""What a server's requests keep: its own policy, and what a request may ask for instead."""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .config import (
    CONFIG_FLAG,
    POLICY_FLAG,
    check_block_size,
    check_number,
    describe,
    make_policy,
)
from .layer_groups import (
    LAYER_GROUPS,
    LAYER_SKEW,
    check_layer_groups,
    check_layer_skew,
    skew_blocks,
)
from .policies import POLICIES, KVPolicy
from .policies.base import SINK, BlockBudget
from .policies.check import PolicyError, build, check_policy, is_built_in
from .policies.options import to_json
from .policies.trial import AttentionShape, try_out
from .recall import RECALL_BLOCKS, RECALL_GIB, check_recall_blocks, check_recall_gib

CONFIG_KEY = "kv_policy"
"""Key of ``VllmConfig.additional_config`` under which the policy travels."""

REQUEST_KEY = "kv_policy"
"""Key of ``SamplingParams.extra_args``, over HTTP of ``vllm_xargs``."""

MAX_REQUEST_TOKENS = "max_request_tokens"
PIN_TOKENS = "pin_prompt_tokens"
PIN = "pin"
PIN_SYSTEM = "system"

CHOICES = ("full", "streaming", "semantic")
"""What a request may name beside the server's own policy; it never has a class imported."""


@dataclass(frozen=True)
class ServedPolicies:
    """The server's own policy, and what a request may have in its place."""

    name: str
    """How the server's own policy was named."""

    default: KVPolicy
    """The server's own policy."""

    max_request_tokens: int | None = None
    """The largest budget that a request may ask for. ``None``: that of the server's own policy;
    0: a request may ask for nothing."""

    layer_groups: int = 1
    """Groups of layers that evict for themselves, each within a budget of its own."""

    layer_skew_tokens: int = 0
    """Tokens by which the budget of the last group is larger than the policy's, and that of the
    first smaller: see :func:`~.layer_groups.skew_blocks`."""

    recall_gib: float = 0.0
    """Host memory for evicted blocks of all requests, of all tensor-parallel ranks together."""

    recall_blocks: int = 0
    """The most blocks that a request recalls at an eviction point of its answer; before the first
    token of an answer there is no limit but the budget."""

    @classmethod
    def from_config(cls, config: object) -> ServedPolicies:
        """Read ``additional_config["kv_policy"]``.

        Args:
            config: ``{"name": ..., "max_request_tokens": ..., "layer_groups": ...,
                "layer_skew_tokens": ..., "recall_gib": ..., "recall_blocks": ..., **options}``,
                or just a name.

        Raises:
            ValueError: another form, an unknown name or option, or a value out of range.
        """
        if isinstance(config, str):
            config = {"name": config}
        if not isinstance(config, Mapping) or "name" not in config:
            raise ValueError(
                f"additional_config[{CONFIG_KEY!r}] {config!r} is not of the form "
                '{"name": "semantic", "semantic_tokens": 192}'
            )
        options = dict(config)
        name, largest = options.pop("name"), options.pop(MAX_REQUEST_TOKENS, None)
        layer_groups = check_layer_groups(options.pop(LAYER_GROUPS, 1))
        skew = options.pop(LAYER_SKEW, 0)
        recall_gib = check_recall_gib(options.pop(RECALL_GIB, 0.0))
        recall_blocks = check_recall_blocks(options.pop(RECALL_BLOCKS, 0), recall_gib)
        default = make_policy(name, options)
        skew = check_layer_skew(skew, layer_groups, default)
        if largest is not None:
            check_number(f"{CONFIG_FLAG}.{MAX_REQUEST_TOKENS}", largest)
        return cls(name, default, largest, layer_groups, skew, recall_gib, recall_blocks)

    def try_out(self, shape: AttentionShape) -> None:
        """Let a policy of somebody's own judge made-up blocks, with every word its options have.

        Raises:
            ValueError: it cannot.
        """
        if is_built_in(type(self.default)):
            return
        try:
            for policy in (self.default, *self.rules):
                try_out(policy, shape)
        except PolicyError as error:
            raise ValueError(f"{POLICY_FLAG} {self.name!r} {error}") from error

    @cached_property
    def classes(self) -> dict[str, type[KVPolicy]]:
        """The policy classes that a request may name, by name."""
        choices = {} if self.max_request_tokens == 0 else {name: POLICIES[name] for name in CHOICES}
        return choices | {self.name: type(self.default)}

    @cached_property
    def rules(self) -> tuple[KVPolicy, ...]:
        """The policies that workers may have to score for: the server's own, and one for every
        combination of words that the options of a class in :attr:`classes` allow."""
        policies = [self.default]
        if self.max_request_tokens != 0:
            policies += [policy for cls in self.classes.values() for policy in _variants(cls)]
        return tuple(dict.fromkeys(p for p in policies if p.bounded and p.scores_blocks))

    @property
    def bounded(self) -> bool:
        """Whether any request may lose a block."""
        return any(cls.bounded for cls in self.classes.values())

    @property
    def num_queries(self) -> int:
        """The widest window of queries that a rule looks at."""
        return max((rule.num_queries for rule in self.rules), default=1)

    def budget(self, policy: KVPolicy, block_size: int, layer_group: int) -> BlockBudget:
        """What a request under a bounded policy keeps in one group of layers."""
        return policy.budget(block_size).shifted(self._skew_blocks(block_size, layer_group))

    def least_budget(self, policy: KVPolicy, block_size: int) -> BlockBudget:
        """The budget in the group of layers that keeps least."""
        skew = self._skew_blocks(block_size, 0)  # the first or the last, whichever sign it has
        return policy.budget(block_size).shifted(-abs(skew))

    def max_budget_blocks(self, block_size: int, layer_group: int) -> int | None:
        """The most blocks that a request may be allowed in one group of layers, whoever says so;
        ``None``: any number."""
        largest = self._max_request_blocks(block_size)
        if largest is None or not self.default.bounded:
            return None
        # A policy that selects nothing keeps its whole budget in every group.
        more = max(0, self._skew_blocks(block_size, layer_group))
        return max(largest, self.default.budget(block_size).total) + more

    def _skew_blocks(self, block_size: int, layer_group: int) -> int:
        return skew_blocks(layer_group, self.layer_groups, self.layer_skew_tokens, block_size)

    def choose(
        self, asked: object, block_size: int, num_prompt_tokens: int, max_tokens: int
    ) -> KVPolicy:
        """The policy of one request.

        Args:
            asked: what came under :data:`REQUEST_KEY`, see :func:`request_options`. Without a
                name, and for what is left out, the server's own policy is what holds.
            block_size: in tokens.
            num_prompt_tokens: of the request; only these can be pinned.
            max_tokens: the most that it may generate.

        Raises:
            ValueError: names the field, the value and what is allowed.
        """
        options = request_options(asked)
        if PIN in options:
            raise ValueError(
                f"{REQUEST_KEY}.{PIN} {PIN_SYSTEM!r} needs a chat that begins with a system "
                f"message; allowed here: {REQUEST_KEY}.{PIN_TOKENS}"
            )
        name = options.pop("name", self.name)
        num_pinned = min(options.pop(PIN_TOKENS, 0), num_prompt_tokens)
        if not isinstance(name, str) or name not in self.classes:
            raise ValueError(
                f"{REQUEST_KEY}.name {reprlib.repr(name)} is not served; "
                f"allowed: {', '.join(self.classes)}"
            )
        if name == self.name:
            options = _options_of(self.default) | options
        policy = make_policy(name, options, field=REQUEST_KEY)
        asked_for = self.to_request(policy)
        if policy.bounded and num_pinned > policy.sink_tokens:
            policy = make_policy(name, {**options, SINK: num_pinned}, field=REQUEST_KEY)
            asked_for = {**asked_for, PIN_TOKENS: num_pinned}
        if policy != self.default:
            check_block_size(policy, block_size, field=REQUEST_KEY)
            self._check_size(policy, asked_for, block_size, num_prompt_tokens + max_tokens)
            self._check_queries(policy)
        return policy

    def describe_default(self, block_size: int) -> str:
        """The server's own policy and its budget in the groups of layers, for the start log."""
        words = describe(self.default, block_size)
        if self.layer_groups == 1 or not self.default.bounded:
            return words
        words += f", in each of {self.layer_groups} groups of layers"
        if self.layer_skew_tokens:
            ends = (0, self.layer_groups - 1)
            first, last = (self.budget(self.default, block_size, end).total for end in ends)
            words += f" on average, from {first} blocks in the first to {last} in the last"
        return words

    def describe(self, block_size: int) -> str:
        """What a request may ask for, in words: the names, and the largest budget in blocks."""
        if self.max_request_tokens == 0:
            return "none of their own"
        largest = self._max_request_blocks(block_size)
        most = "any number of blocks" if largest is None else f"up to {largest} blocks"
        return f"{', '.join(self.classes)}, {most}"

    def to_request(self, policy: KVPolicy) -> dict[str, Any]:
        """A policy in the form in which a request asks for it, ``{"name": ..., **options}``;
        :meth:`choose` makes an equal policy of that."""
        name = next(name for name, cls in self.classes.items() if cls is type(policy))
        return {"name": name, **_options_of(policy)}

    def _check_size(
        self, policy: KVPolicy, asked_for: Mapping[str, Any], block_size: int, num_tokens: int
    ) -> None:
        """Refuse a request that could hold more than one may ask for."""
        largest = self._max_request_blocks(block_size)
        held = -(-num_tokens // block_size)
        if policy.bounded:
            held = min(held, policy.budget(block_size).total)
        if largest is not None and held > largest:
            raise ValueError(
                f"{REQUEST_KEY} {asked_for} keeps {held} blocks of {block_size} "
                f"tokens; allowed: {largest} blocks, the server's {CONFIG_FLAG}."
                f"{MAX_REQUEST_TOKENS}"
            )

    def _check_queries(self, policy: KVPolicy) -> None:
        """Refuse options for which the workers do not keep enough queries."""
        if policy.bounded and policy.scores_blocks and policy.num_queries > self.num_queries:
            raise ValueError(
                f"{REQUEST_KEY} {self.to_request(policy)} looks at {policy.num_queries} queries; "
                f"allowed: {self.num_queries}, as many as the server's own policy looks at"
            )

    def _max_request_blocks(self, block_size: int) -> int | None:
        if self.max_request_tokens is not None:
            return -(-self.max_request_tokens // block_size)
        return self.default.budget(block_size).total if self.default.bounded else None


def has_policy(config: Any) -> bool:
    """Whether an ``EngineArgs`` or a ``VllmConfig`` asks for a policy."""
    additional_config = config.additional_config
    return isinstance(additional_config, dict) and CONFIG_KEY in additional_config


def flags_to_config(
    name: str | None, options: Mapping[str, Any] | str | None
) -> dict[str, Any] | None:
    """Turn the two flags into ``additional_config["kv_policy"]``; ``None`` without a policy.

    Args:
        name: of the policy.
        options: an object, or its JSON text.

    Raises:
        ValueError: as :meth:`ServedPolicies.from_config`, or options without a policy.
    """
    if isinstance(options, str):
        options = _parse(CONFIG_FLAG, options)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"{CONFIG_FLAG} {reprlib.repr(options)} is not a JSON object such as "
            '{"semantic_tokens": 192}'
        )
    if name is None:
        if options:
            raise ValueError(
                f"{CONFIG_FLAG} {dict(options)!r} needs {POLICY_FLAG}; "
                f"allowed: {', '.join(POLICIES)}"
            )
        return None
    if "name" in (options or {}):
        raise ValueError(
            f"{CONFIG_FLAG}.name is not an option of policy {name!r}; allowed: {POLICY_FLAG}"
        )
    config = {"name": name, **(options or {})}
    ServedPolicies.from_config(config)
    return config


def request_options(asked: object) -> dict[str, Any]:
    """What a request asked for, as an object of its own.

    Args:
        asked: ``{"name": ..., "pin_prompt_tokens": ..., "pin": "system", **options}``, its JSON
            text (``vllm_xargs`` takes no objects), or just a name.

    Raises:
        ValueError: another form, or something to pin that is neither a number of tokens nor
            ``"system"``.
    """
    if isinstance(asked, str):
        asked = _parse(REQUEST_KEY, asked) if asked.lstrip().startswith("{") else {"name": asked}
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"{REQUEST_KEY} {reprlib.repr(asked)} is neither a name nor of the form "
            '{"name": "semantic", "semantic_tokens": 192}'
        )
    options = dict(asked)
    if PIN_TOKENS in options:
        check_number(f"{REQUEST_KEY}.{PIN_TOKENS}", options[PIN_TOKENS])
    if options.get(PIN, PIN_SYSTEM) != PIN_SYSTEM:
        raise ValueError(
            f"{REQUEST_KEY}.{PIN} {reprlib.repr(options[PIN])} is not known; allowed: {PIN_SYSTEM}"
        )
    return options


def _parse(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} {reprlib.repr(text)} is not JSON: {error}") from error


def _options_of(policy: KVPolicy) -> dict[str, Any]:
    return {option: to_json(getattr(policy, option)) for option in policy.options()}


def _variants(cls: type[KVPolicy]) -> Iterator[KVPolicy]:
    """A policy for each combination of the words that a class allows."""
    for words in itertools.product(*cls.choices.values()):
        policy = build(cls, dict(zip(cls.choices, words, strict=True)))
        if not is_built_in(cls):
            check_policy(policy)
        yield policy
