"""The rows of a quality report: a policy, how the weights are held, and a budget."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_semantic.config import KV_CACHE_DTYPES
from vllm_semantic.layer_groups import LAYER_GROUPS, LAYER_SKEW
from vllm_semantic.policies import POLICIES, KVPolicy
from vllm_semantic.policies.base import RECALL, RECENT

HALVES = ("h2o",)
"""Policies whose rule is as much by score as recent."""

SINKS = 8
"""Tokens of a budget that are for sinks: a block in any case, also where a policy has four."""


@dataclass(frozen=True)
class Row:
    """One way to hold a text in memory."""

    policy: str
    quantization: str
    budget: int
    options: dict[str, Any] = field(default_factory=dict)
    layer_groups: int = 1
    layer_skew_tokens: int = 0

    @property
    def engine_kwargs(self) -> dict[str, str]:
        """How the engine holds weights, and keys and values."""
        parts = (part for part in self.quantization.split("+") if part != "none")
        return {
            "kv_cache_dtype" if part in KV_CACHE_DTYPES else "quantization": part for part in parts
        }

    def title(self, budgets: Sequence[int]) -> str:
        """How the row is called in tables: only what tells it from the others."""
        held = self.quantization.replace("bitsandbytes", "NF4").replace("+", " + ")
        of = "" if held == "none" else f"{held} + "
        at = f" @ {self.budget}" if len(budgets) > 1 and self.policy != "full" else ""
        groups = f" in {self.layer_groups} groups" if self.layer_groups > 1 else ""
        groups += f", skew {self.layer_skew_tokens}" if self.layer_skew_tokens else ""
        return f"{of}{self.policy}{groups}{at}"


def policy_options(policy: str, budget: int) -> dict[str, Any]:
    """A policy's options for a budget in tokens, such that all hold the same number of blocks.

    Args:
        policy: its name and, each after a colon, words that its options allow, a recent window of
            its own, and ``recall``: ``semantic:contribution:max:recent_tokens=128:recall``.
        budget: tokens.

    Raises:
        ValueError: the policy or a word is not known, or the budget leaves it no room.
    """
    name, *words = policy.split(":")
    if name not in POLICIES:
        raise ValueError(f"--policies {policy!r} is not known; allowed: {', '.join(POLICIES)}")
    cls = POLICIES[name]
    chosen = _variant(policy, cls, words)
    if not cls.bounded:
        return chosen
    parts = cls().parts()
    sink, recent = parts.pop("sink_tokens"), parts.pop(RECENT)
    room = budget - SINKS
    given = chosen.pop(RECENT, None)
    for option in parts:  # at most one
        # Halves stay halves; any other recent window stays while it is no more than that.
        recent = room // 2 if name in HALVES else min(recent, room // 2)
        recent = recent if given is None else min(given, room - 1)
        chosen[option] = room - recent
    if not parts:
        recent = room
    if recent <= 0 or room <= 0:
        raise ValueError(
            f"--budget {budget} is too small for {policy}; allowed: {SINKS + 2} and more"
        )
    return {"sink_tokens": sink, "recent_tokens": recent, **chosen}


def server_options(rows: Sequence[Row], recall: Mapping[str, float]) -> dict[str, Any]:
    """What a server has to have for rows of which some recall blocks.

    Args:
        rows: that it serves.
        recall: its options for that.
    """
    return dict(recall) if any(row.options.get(RECALL) for row in rows) else {}


def recalls(title: str) -> bool:
    """Whether a row of a table, by its title, is of a policy whose blocks come back."""
    return RECALL in title.partition(" ")[0].split(":")


def _variant(policy: str, cls: type[KVPolicy], words: Sequence[str]) -> dict[str, Any]:
    """The options that words stand for.

    Raises:
        ValueError: one stands for none.
    """
    # Nothing comes back under a name that does not say so, whatever the server has.
    chosen: dict[str, Any] = {RECALL: False} if RECALL in cls.options() else {}
    allowed = {word: option for option, of in cls.choices.items() for word in of}
    of_any = [f"{RECENT}=TOKENS", RECALL] if cls().selected_tokens else []
    for word in words:
        option, _, tokens = word.rpartition("=")
        if word == RECALL and cls().recalls:
            chosen[RECALL] = True
        elif word in allowed:
            chosen[allowed[word]] = word
        elif option == RECENT and tokens.isdecimal() and cls().selected_tokens:
            chosen[RECENT] = int(tokens)
        else:
            raise ValueError(
                f"--policies {policy!r}: {word!r} is no variant of it; "
                f"allowed: {', '.join([*allowed, *of_any])}"
            )
    return chosen


def rows_of(
    policies: Sequence[str],
    quantization: Sequence[str],
    budgets: Sequence[int],
    layer_groups: Sequence[int] = (1,),
    layer_skew_tokens: int = 0,
) -> list[Row]:
    """Every combination once; where there are several groups of layers, with this skew.

    ``full`` has no budget, so it is measured at the first alone. What evicts by age or by lot
    takes the same from every group of layers, so it is measured in one.
    """
    rows = []
    for quantized, policy, budget in itertools.product(quantization, policies, budgets):
        if policy == "full" and budget != budgets[0]:
            continue
        options = policy_options(policy, budget)
        for groups in layer_groups if _chooses(policy) else (1,):
            skew = layer_skew_tokens if groups > 1 else 0
            of_groups = {LAYER_GROUPS: groups, LAYER_SKEW: skew} if groups > 1 else {}
            rows.append(Row(policy, quantized, budget, options | of_groups, groups, skew))
    return rows


def _chooses(policy: str) -> bool:
    """Whether what goes may differ between groups of layers."""
    cls = POLICIES[policy.partition(":")[0]]
    return cls.bounded and cls().scores_blocks
