"""What is known not to pass, and why."""

from __future__ import annotations

import re

CORE = "tests/v1/core"

DEVIATIONS: dict[str, dict[str, str]] = {
    "installed": {},
    "semantic": {
        f"{CORE}/test_kv_cache_utils.py::test_get_kv_cache_config_one_worker": (
            "Refused by the plugin: with disable_hybrid_kv_cache_manager vLLM puts layers with and "
            "without a window into one group. They would share a block table, and the window "
            "would lose blocks that it needs. The checks of this test before that one pass."
        ),
        f"{CORE}/test_kv_cache_utils.py::test_is_kv_cache_spec_uniform": (
            "The same refusal: the test merges a full-attention layer and one with a window."
        ),
    },
}
"""Way -> test -> why it does not do what it does without the plugin."""

CAUSES = {
    r"No common block size for 16 \(CPU_ATTN": (
        "the test asks for blocks of 16 tokens, vLLM's CPU attention takes multiples of 32"
    ),
    r"LocalEntryNotFoundError|Invalid repository ID": "needs a model of a hub",
}
"""What fails without the plugin, by a pattern of its message."""


def cause_of(message: str) -> str:
    """Why a test fails on this machine whatever the plugin does."""
    return next(
        (cause for pattern, cause in CAUSES.items() if re.search(pattern, message)),
        f"not looked into: {message[:200]}",
    )
