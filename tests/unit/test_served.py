"""What a request may ask for: every refusal names the field and says what is allowed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.frontend import asks_for_policy, checked, system_chats, with_pinned
from vllm_semantic.layer_groups import skew_blocks
from vllm_semantic.policies import FullPolicy, KVPolicy, SemanticPolicy, StreamingPolicy
from vllm_semantic.policies.snapkv import SnapKVPolicy
from vllm_semantic.served import REQUEST_KEY, ServedPolicies, flags_to_config, request_options

from .. import policy_requests

BLOCK_SIZE = 32
SEMANTIC = ServedPolicies.from_config("semantic")
GENEROUS = ServedPolicies.from_config({"name": "semantic", "max_request_tokens": 1024})
FULL = ServedPolicies.from_config("full")


def choose(
    served: ServedPolicies, asked: object, num_prompt_tokens: int = 4000, max_tokens: int = 96
) -> KVPolicy:
    return served.choose(asked, BLOCK_SIZE, num_prompt_tokens, max_tokens)


# -- what a request gets ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "asked", "policy"),
    [
        (SEMANTIC, {}, SemanticPolicy()),
        (SEMANTIC, "semantic", SemanticPolicy()),
        (SEMANTIC, "streaming", StreamingPolicy()),
        (SEMANTIC, {"similarity": "study"}, SemanticPolicy(similarity="study")),
        (SEMANTIC, '{"semantic_tokens": 64}', SemanticPolicy(semantic_tokens=64)),
        (SEMANTIC, {"pin_prompt_tokens": 32}, SemanticPolicy(sink_tokens=32)),
        (SEMANTIC, {"pin_prompt_tokens": 5}, SemanticPolicy()),  # a sink is pinned anyway
        (GENEROUS, {"semantic_tokens": 512}, SemanticPolicy(semantic_tokens=512)),
        (
            GENEROUS,
            {"name": "streaming", "pin_prompt_tokens": 640},
            StreamingPolicy(sink_tokens=640),
        ),
        (FULL, "full", FullPolicy()),
        (FULL, {"pin_prompt_tokens": 640}, FullPolicy()),
        (FULL, {"name": "semantic", "semantic_tokens": 8192}, SemanticPolicy(semantic_tokens=8192)),
    ],
)
def test_a_request_gets_what_it_asks_for(
    served: ServedPolicies, asked: object, policy: KVPolicy
) -> None:
    assert choose(served, asked) == policy


def test_what_is_left_out_is_the_servers_own() -> None:
    served = ServedPolicies.from_config({"name": "semantic", "semantic_tokens": 512})
    assert choose(served, {"recent_tokens": 32}) == SemanticPolicy(
        recent_tokens=32, semantic_tokens=512
    )
    assert choose(served, "streaming") == StreamingPolicy()


def test_only_the_prompt_is_pinned() -> None:
    assert choose(GENEROUS, {"pin_prompt_tokens": 9999}, 100).sink_tokens == 100


def test_the_full_cache_of_a_short_request_is_within_any_budget() -> None:
    assert choose(SEMANTIC, "full", 200, 88) == FullPolicy()
    with pytest.raises(ValueError, match=r"keeps 10 blocks of 32 tokens; allowed: 9 blocks"):
        choose(SEMANTIC, "full", 200, 89)


@pytest.mark.parametrize("served", [SEMANTIC, GENEROUS, FULL])
def test_what_was_chosen_is_chosen_again(served: ServedPolicies) -> None:
    """The scheduler reads what the front end has written."""
    study = {"name": "semantic", "similarity": "study"}
    for asked in ({}, "streaming", {"pin_prompt_tokens": 32}, study):
        policy = choose(served, asked)
        assert choose(served, served.to_request(policy)) == policy


# -- what it does not get --------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (7, r"kv_policy 7 is neither a name nor of the form"),
        (["semantic"], r"kv_policy \['semantic'\] is neither"),
        ('{"name": ', r"kv_policy '\{\"name\": ' is not JSON"),
        ("{" * 100_000, r"kv_policy '\{+\.\.\.\{+' is not JSON"),
        ('{"a":' * 100_000, r"kv_policy .* is not JSON"),
        ("smart", r"kv_policy.name 'smart' is not served; allowed: full, streaming, semantic"),
        ({"name": ["full"]}, r"kv_policy.name \['full'\] is not served"),
        ("os.path.Class", r"kv_policy.name 'os.path.Class' is not served"),
        ("snapkv", r"kv_policy.name 'snapkv' is not served"),
        ({"semantic_token": 64}, r"kv_policy.semantic_token is not an option .* allowed: sink_tok"),
        ({"semantic_tokens": -1}, r"kv_policy.semantic_tokens -1 is not a number of tokens"),
        ({"semantic_tokens": 64.0}, r"kv_policy.semantic_tokens 64.0 is not a number of tokens"),
        ({"semantic_tokens": "9" * 500}, r"kv_policy.semantic_tokens '9+\.\.\.9+' is not"),
        (
            {"similarity": "x"},
            r"kv_policy.similarity 'x' is not known; allowed: contribution, attention, study",
        ),
        ({"similarity": []}, r"kv_policy.similarity \[\] is not known"),
        ({"recent_tokens": 0}, r"kv_policy.recent_tokens 0 would evict"),
        ({"recent_tokens": 31}, r"--block-size 32 is too coarse for kv_policy.recent_tokens 31"),
        ({"pin_prompt_tokens": "64"}, r"kv_policy.pin_prompt_tokens '64' is not a number"),
        ({"pin_prompt_tokens": True}, r"kv_policy.pin_prompt_tokens True is not a number"),
        ({"pin": "user"}, r"kv_policy.pin 'user' is not known; allowed: system"),
        ({"pin": "system"}, r"kv_policy.pin 'system' needs a chat .* kv_policy.pin_prompt_tokens"),
        ({"semantic_tokens": 129}, r"keeps 10 blocks of 32 tokens; allowed: 9 blocks, the server"),
        (
            {"pin_prompt_tokens": 33},
            r"'pin_prompt_tokens': 33} keeps 10 blocks .* --kv-policy-config.max_request_tokens",
        ),
        (
            {"pin_prompt_tokens": 32, "semantic_tokens": 192},
            r"'semantic_tokens': 192, .*'pin_prompt_tokens': 32} keeps 11 blocks",
        ),
        ("full", r"kv_policy \{'name': 'full'\} keeps 128 blocks"),
    ],
)
def test_refused(asked: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        choose(SEMANTIC, asked)
    assert len(str(refusal.value)) < 500, "what a client sends is not sent back whole"


def test_an_operator_may_allow_nothing() -> None:
    served = ServedPolicies.from_config({"name": "semantic", "max_request_tokens": 0})
    assert choose(served, {}) == SemanticPolicy()
    with pytest.raises(ValueError, match=r"is not served; allowed: semantic"):
        choose(served, "streaming")
    with pytest.raises(ValueError, match=r"allowed: 0 blocks"):
        choose(served, {"semantic_tokens": 64})
    assert served.rules == (SemanticPolicy(),)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_layers_are_in_a_number_of_groups(value: object) -> None:
    message = r"--kv-policy-config.layer_groups .* is not a number of groups; allowed: integers"
    with pytest.raises(ValueError, match=message):
        ServedPolicies.from_config({"name": "semantic", "layer_groups": value})


def test_a_request_has_no_layer_groups_of_its_own() -> None:
    served = ServedPolicies.from_config({"name": "semantic", "layer_groups": 3})
    assert served.layer_groups == 3
    assert choose(served, {}) == SemanticPolicy()
    with pytest.raises(ValueError, match=r"kv_policy.layer_groups is not an option"):
        choose(served, {"layer_groups": 2})


GROUPED = {"name": "semantic", "layer_groups": 3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GROUPED | {"layer_skew_tokens": "64"}, r"_tokens '64' is not a number of tokens; allowed"),
        (GROUPED | {"layer_skew_tokens": True}, r"_tokens True is not a number of tokens; allowed"),
        (GROUPED | {"layer_skew_tokens": 2**40}, r"is not a number of tokens; allowed: integers"),
        (GROUPED | {"layer_skew_tokens": 129}, r"129 is more than the 128 tokens .* -128 to 128"),
        (GROUPED | {"layer_skew_tokens": -129}, r"-129 is more than the 128 tokens"),
        (GROUPED | {"name": "streaming", "layer_skew_tokens": 1}, r"1 is more than the 0 tokens"),
        ({"name": "semantic", "layer_skew_tokens": 32}, r"needs --kv-policy-config.layer_groups"),
    ],
)
def test_a_skew_that_does_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"--kv-policy-config.layer_skew.*{message}"):
        ServedPolicies.from_config(config)


@pytest.mark.parametrize(
    ("skew", "budgets"), [(0, [9, 9, 9]), (96, [6, 9, 12]), (-96, [12, 9, 6]), (128, [5, 9, 13])]
)
def test_deeper_layers_keep_more(skew: int, budgets: list[int]) -> None:
    served = ServedPolicies.from_config(GROUPED | {"layer_skew_tokens": skew})
    of_default = [served.budget(served.default, 32, group) for group in range(3)]
    assert [budget.total for budget in of_default] == budgets
    assert {(budget.sink, budget.recent) for budget in of_default} == {(1, 4)}
    assert served.least_budget(served.default, 32).total == min(budgets)
    words = f", in each of 3 groups of layers on average, from {budgets[0]} blocks in the first to "
    assert served.describe_default(32).endswith(f"{words}{budgets[2]} in the last") == bool(skew)
    # A request that selects less moves no more than that; one that selects nothing stays.
    small = SemanticPolicy(semantic_tokens=64)
    shift = min(2, abs(skew) // 32) * (1 if skew > 0 else -1)
    assert [served.budget(small, 32, group).total for group in range(3)] == [
        7 - shift,
        7,
        7 + shift,
    ]
    assert {served.budget(StreamingPolicy(), 32, group).total for group in range(3)} == {9}
    # What is set aside for the largest request covers both.
    for group, budget in enumerate(budgets):
        assert served.max_budget_blocks(32, group) == max(9, budget)


def test_a_skew_moves_blocks_between_groups_and_makes_none() -> None:
    for num_groups in range(2, 20):
        for skew in range(-200, 201, 7):
            moved = [skew_blocks(group, num_groups, skew, 16) for group in range(num_groups)]
            assert sum(moved) == 0
            assert moved == sorted(moved, reverse=skew < 0)
            assert moved[-1] == -moved[0] == round(skew / 16)


@pytest.mark.parametrize("value", [-1, 1.5, "9", True, 2**31])
def test_the_largest_budget_is_a_number_of_tokens(value: object) -> None:
    message = r"--kv-policy-config.max_request_tokens .* is not a number of tokens; allowed: int"
    with pytest.raises(ValueError, match=message):
        ServedPolicies.from_config({"name": "semantic", "max_request_tokens": value})


@settings(deadline=None, derandomize=True, max_examples=2000)
@given(policy_requests.requests, st.booleans(), st.integers(1, 3000), st.integers(1, 3000))
def test_whatever_is_asked_for_is_served_within_bounds_or_refused(
    asked: Any, as_text: bool, num_prompt_tokens: int, max_tokens: int
) -> None:
    if as_text:
        asked = json.dumps(asked)
    for served in (SEMANTIC, GENEROUS, FULL):
        try:
            policy = choose(served, asked, num_prompt_tokens, max_tokens)
        except ValueError as refusal:
            assert str(refusal).startswith(("kv_policy", "--block-size"))
            continue
        assert choose(served, served.to_request(policy), num_prompt_tokens, max_tokens) == policy
        most = served.max_budget_blocks(BLOCK_SIZE, 0)
        held = -(-(num_prompt_tokens + max_tokens) // BLOCK_SIZE)
        if policy.bounded:
            held = min(held, policy.budget(BLOCK_SIZE).total)
        assert most is None or held <= most


# -- what the engine prepares for ------------------------------------------------------


def test_sizes_cover_what_any_request_may_get() -> None:
    assert SEMANTIC.max_budget_blocks(BLOCK_SIZE, 0) == 9
    assert GENEROUS.max_budget_blocks(BLOCK_SIZE, 0) == 32
    assert FULL.max_budget_blocks(BLOCK_SIZE, 0) is None
    small = ServedPolicies.from_config({"name": "semantic", "max_request_tokens": 64})
    assert small.max_budget_blocks(BLOCK_SIZE, 0) == 9, "the server's own still fits"


def test_what_a_request_may_ask_for_in_words() -> None:
    assert SEMANTIC.describe(BLOCK_SIZE) == "full, streaming, semantic, up to 9 blocks"
    assert FULL.describe(BLOCK_SIZE) == "full, streaming, semantic, any number of blocks"
    closed = ServedPolicies.from_config({"name": "semantic", "max_request_tokens": 0})
    assert closed.describe(BLOCK_SIZE) == "none of their own"


def test_rules_are_those_a_request_may_run_under() -> None:
    semantic = {
        SemanticPolicy(similarity=similarity, heads=heads)
        for similarity in ("attention", "contribution", "study")
        for heads in ("mean", "max")
    }
    assert set(SEMANTIC.rules) == set(FULL.rules) == semantic
    assert SEMANTIC.num_queries == FULL.num_queries == 8
    assert FULL.bounded
    snapkv = ServedPolicies.from_config("snapkv")
    assert set(snapkv.rules) == semantic | {SnapKVPolicy()}
    assert snapkv.num_queries == max(8, SnapKVPolicy().num_queries)
    streaming = ServedPolicies.from_config({"name": "streaming", "max_request_tokens": 0})
    assert streaming.rules == ()


# -- the front end ---------------------------------------------------------------------


def config(kv_policy: object) -> Any:
    additional = {} if kv_policy is None else {"kv_policy": kv_policy}
    return SimpleNamespace(
        additional_config=additional, cache_config=SimpleNamespace(block_size=BLOCK_SIZE)
    )


def test_an_engine_without_a_policy_is_left_alone() -> None:
    asked = {REQUEST_KEY: "semantic"}
    assert not asks_for_policy(asked, config(None))
    assert not asks_for_policy({"other": 1}, config("semantic"))
    assert not asks_for_policy(None, config("semantic"))
    assert asks_for_policy(asked, config("semantic"))


def test_checked_arguments_say_all_of_the_policy() -> None:
    args = checked({REQUEST_KEY: '{"semantic_tokens": 64}', "o": 1}, config("semantic"), 500, 16)
    assert args == {
        "o": 1,
        REQUEST_KEY: {
            "name": "semantic",
            "sink_tokens": 8,
            "recent_tokens": 128,
            "semantic_tokens": 64,
            "similarity": "contribution",
            "heads": "max",
            "recall": True,
        },
    }


def test_a_system_message_is_counted_in_tokens() -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Why?"}
    asked = {REQUEST_KEY: '{"name": "semantic", "pin": "system"}'}
    shorter, longer = system_chats(asked, [system, user, system])
    assert shorter[:-1] == [system]
    assert shorter[-1]["role"] == longer[-1]["role"] == "user"
    assert longer[0] == {"role": "system", "content": "Be brief. -"}
    assert system_chats(asked, [user, system]) == []
    assert system_chats({REQUEST_KEY: "semantic"}, [system, user]) == []
    of_parts = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    _, longer = system_chats(asked, [system, of_parts, user])
    assert longer[0] == system
    assert [part["text"] for part in longer[1]["content"]] == ["Be brief.", " -"]
    whole, shorter, longer = [1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 7, 9], [1, 2, 3, 5, 4, 7, 9]
    args = with_pinned(asked, whole, shorter, longer)
    assert request_options(args[REQUEST_KEY]) == {"name": "semantic", "pin_prompt_tokens": 4}
    more = {REQUEST_KEY: {"pin": "system", "pin_prompt_tokens": 6}}
    pinned = with_pinned(more, whole, shorter, longer)
    assert request_options(pinned[REQUEST_KEY]) == {"pin_prompt_tokens": 6}


def test_a_system_message_elsewhere_is_refused() -> None:
    asked = {REQUEST_KEY: '{"pin": "system"}'}
    with pytest.raises(ValueError, match=r"kv_policy\.pin 'system'.*pin_prompt_tokens"):
        with_pinned(asked, [1, 9, 9, 2, 3, 4, 8], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5, 7])


def test_a_name_among_the_options_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--kv-policy-config\.name is not an option.*--kv-policy"):
        flags_to_config("semantic", {"name": "streaming"})
