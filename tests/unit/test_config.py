"""From what a user writes to a policy; every refusal says what is allowed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from vllm_semantic.config import (
    MAX_TOKENS,
    capacity,
    check_block_size,
    describe,
    make_policy,
    resolve_policy_class,
)
from vllm_semantic.policies import (
    BlockView,
    FullPolicy,
    KVPolicy,
    SemanticPolicy,
    StreamingPolicy,
)
from vllm_semantic.served import CONFIG_KEY, ServedPolicies, flags_to_config


@dataclass(frozen=True, kw_only=True)
class OwnPolicy(KVPolicy):
    """A policy that a user might write."""

    name: ClassVar[str] = "own"

    recent_tokens: int = 64
    favourite_tokens: int = 32

    def score(self, view: BlockView) -> torch.Tensor:
        return view.full.keys.amax((2, 3, 4))


OWN = f"{__name__}.OwnPolicy"


# -- what is accepted ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        ("full", None, FullPolicy()),
        ("full", {}, FullPolicy()),
        ("streaming", None, StreamingPolicy()),
        ("semantic", {"semantic_tokens": 512}, SemanticPolicy(semantic_tokens=512)),
        ("semantic", {"sink_tokens": 0}, SemanticPolicy(sink_tokens=0)),
        ("semantic", {"recent_tokens": MAX_TOKENS}, SemanticPolicy(recent_tokens=MAX_TOKENS)),
        (OWN, {"favourite_tokens": 96}, OwnPolicy(favourite_tokens=96)),
        ("vllm_semantic.policies.SemanticPolicy", None, SemanticPolicy()),
    ],
)
def test_accepted(name: str, options: dict[str, int] | None, policy: KVPolicy) -> None:
    assert make_policy(name, options) == policy
    assert ServedPolicies.from_config({"name": name, **(options or {})}).default == policy
    config = flags_to_config(name, options)
    assert config == {"name": name, **(options or {})}
    assert ServedPolicies.from_config(config).default == policy


def test_just_a_name_is_enough() -> None:
    assert ServedPolicies.from_config("streaming").default == StreamingPolicy()
    assert ServedPolicies.from_config(OWN).default == OwnPolicy()


@pytest.mark.parametrize("options", [None, {}])
def test_no_policy_is_no_config(options: dict[str, int] | None) -> None:
    assert flags_to_config(None, options) is None


# -- what is refused -------------------------------------------------------------------


def refused(*parts: Any) -> Any:
    """A ValueError whose message has these parts in this order."""
    return pytest.raises(ValueError, match=".*".join(re.escape(str(part)) for part in parts))


@pytest.mark.parametrize("name", ["semantics", "Semantic", "", "semantic ", None, 7, ["semantic"]])
def test_wrong_name(name: object) -> None:
    with refused("--kv-policy", repr(name), "allowed:", "full, streaming, semantic", "KVPolicy"):
        make_policy(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module.Policy", "No module named"),
        (f"{__name__}.NoSuchPolicy", "has no attribute 'NoSuchPolicy'"),
        ("vllm_semantic.policies.BlockBudget", "is not a subclass of KVPolicy"),
        ("vllm_semantic.policies.POLICIES", "is not a subclass of KVPolicy"),
    ],
)
def test_wrong_qualified_name(name: str, reason: str) -> None:
    with refused("--kv-policy", repr(name), reason):
        resolve_policy_class(name)


NOT_TOKENS = [-1, -(10**9), 1.5, 8.0, "64", None, True, False, [64], MAX_TOKENS + 1, 10**30]


@pytest.mark.parametrize("value", NOT_TOKENS, ids=repr)
@pytest.mark.parametrize(
    ("name", "option"),
    [("semantic", "semantic_tokens"), ("streaming", "sink_tokens"), (OWN, "favourite_tokens")],
)
def test_not_a_number_of_tokens(name: str, option: str, value: object) -> None:
    allowed = f"allowed: integers from 0 to {MAX_TOKENS}"
    with refused(f"--kv-policy-config.{option} {value!r}", "number of tokens", allowed):
        make_policy(name, {option: value})


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("full", "allowed: none"),
        ("streaming", "allowed: sink_tokens, recent_tokens"),
        ("semantic", "allowed: sink_tokens, recent_tokens, semantic_tokens"),
        (OWN, "allowed: sink_tokens, recent_tokens, favourite_tokens"),
    ],
)
def test_unknown_option(name: str, allowed: str) -> None:
    with refused("--kv-policy-config.budget is not an option of policy", repr(name), allowed):
        make_policy(name, {"budget": 64})


def test_options_of_another_policy() -> None:
    with refused("--kv-policy-config.semantic_tokens", "'streaming'", "allowed:"):
        make_policy("streaming", {"semantic_tokens": 64})
    with refused("--kv-policy-config.sink_tokens", "'full'", "allowed: none"):
        make_policy("full", {"sink_tokens": 8})


@pytest.mark.parametrize("name", ["semantic", None])
@pytest.mark.parametrize("options", [[64], "[64]", [], 64, 0])
def test_options_that_are_no_object(name: str | None, options: Any) -> None:
    with refused("--kv-policy-config", str(options), "JSON object"):
        flags_to_config(name, options)


@pytest.mark.parametrize("name", ["semantic", None])
@pytest.mark.parametrize("options", ["", "sink_tokens", "semantic_tokens=512", '{"a": }'])
def test_options_in_text_that_is_no_json(name: str | None, options: str) -> None:
    with refused("--kv-policy-config", repr(options), "is not JSON"):
        flags_to_config(name, options)


def test_options_may_be_json_text() -> None:
    """As the flag takes them."""
    expected = {"name": "semantic", "semantic_tokens": 512}
    assert flags_to_config("semantic", '{"semantic_tokens": 512}') == expected
    assert flags_to_config("semantic", "{}") == {"name": "semantic"}
    assert flags_to_config(None, "{}") is None


def test_options_without_a_policy() -> None:
    options = {"semantic_tokens": 64}
    with refused("--kv-policy-config", options, "needs --kv-policy", "allowed: full, streaming"):
        flags_to_config(None, options)


@pytest.mark.parametrize("name", ["streaming", "semantic", OWN])
def test_no_recent_tokens(name: str) -> None:
    with refused("--kv-policy-config.recent_tokens 0", f"allowed: integers from 1 to {MAX_TOKENS}"):
        make_policy(name, {"recent_tokens": 0})


def test_flags_are_validated_before_they_travel() -> None:
    with refused("--kv-policy-config.sink_tokens -1"):
        flags_to_config("semantic", {"sink_tokens": -1})


@pytest.mark.parametrize("config", [None, 3, [], {}, {"semantic_tokens": 64}, {"Name": "full"}])
def test_additional_config_of_another_form(config: object) -> None:
    with refused(f"additional_config['{CONFIG_KEY}']", repr(config), '"name": "semantic"'):
        ServedPolicies.from_config(config)


def test_additional_config_is_validated_too() -> None:
    with refused("--kv-policy-config.semantic_tokens -5"):
        ServedPolicies.from_config({"name": "semantic", "semantic_tokens": -5})
    with refused("--kv-policy", "'lru'"):
        ServedPolicies.from_config("lru")


# -- block sizes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "block_size", "option", "tokens"),
    [
        (SemanticPolicy(), 129, "recent_tokens", 128),
        (SemanticPolicy(recent_tokens=64), 128, "recent_tokens", 64),
        (SemanticPolicy(recent_tokens=256), 129, "semantic_tokens", 128),
        (StreamingPolicy(), 257, "recent_tokens", 256),
        (OwnPolicy(), 64, "favourite_tokens", 32),
    ],
)
def test_a_block_size_coarser_than_a_part(
    policy: KVPolicy, block_size: int, option: str, tokens: int
) -> None:
    with refused(
        f"--block-size {block_size}",
        f"--kv-policy-config.{option} {tokens}",
        f"allowed: a block size of at most {tokens}, or {option} of at least {block_size}",
    ):
        check_block_size(policy, block_size)


@pytest.mark.parametrize(
    ("policy", "block_size"),
    [
        (SemanticPolicy(), 128),  # the sink rounds up
        (SemanticPolicy(semantic_tokens=0), 64),  # asked for nothing, gets nothing
        (StreamingPolicy(), 256),
        (FullPolicy(), 4096),  # nothing to round
    ],
)
def test_a_block_size_that_fits(policy: KVPolicy, block_size: int) -> None:
    check_block_size(policy, block_size)


# -- the start log ---------------------------------------------------------------------


def test_describe_says_what_is_held() -> None:
    assert describe(FullPolicy(), 16) == "KV policy full: every block is kept"
    assert describe(SemanticPolicy(), 32) == (
        "KV policy semantic: sink 8 + recent 128 + semantic 128 = 264 tokens, "
        "held as 9 blocks of 32 (288 tokens) per request"
    )
    assert describe(StreamingPolicy(), 16) == (
        "KV policy streaming: sink 4 + recent 256 = 260 tokens, "
        "held as 17 blocks of 16 (272 tokens) per request"
    )


@pytest.mark.parametrize(
    ("num_blocks", "per_request", "requests"), [(100, 10, 10), (99, 10, 9), (3, 10, 0), (-4, 2, 0)]
)
def test_capacity(num_blocks: int, per_request: int, requests: int) -> None:
    assert capacity(num_blocks, per_request) == requests
