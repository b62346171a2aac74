"""Hypothesis strategies of what a client may send as a policy."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_semantic.policies import SemanticPolicy

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    [*SemanticPolicy.options(), "name", "pin", "pin_prompt_tokens", "max_request_tokens"]
)
plausible = json_values | st.sampled_from(
    ["full", "streaming", "semantic", "study", "attention", "system", 0, 8, 32, 64, 200, 2**31]
)
asked_of_us = st.dictionaries(fields, plausible, max_size=6)
requests = json_values | asked_of_us
