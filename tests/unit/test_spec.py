"""The KV cache format of a layer under a policy, and how vLLM finds its manager."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SlidingWindowManager,
    get_manager_for_kv_cache_spec,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_semantic.engine.manager import SemanticManager
from vllm_semantic.engine.spec import SemanticSpec, semantic_spec, semantic_specs
from vllm_semantic.policies import FullPolicy, KVPolicy, SemanticPolicy, StreamingPolicy
from vllm_semantic.served import ServedPolicies

SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL_ATTENTION = FullAttentionSpec(**SHAPE)

repeatable = settings(deadline=None, derandomize=True)


def sizes(max_model_len: int = 8192, max_num_batched_tokens: int = 512, batches: int = 1) -> Any:
    """The part of a VllmConfig that sizing reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=max_num_batched_tokens, async_scheduling=False
        ),
        max_in_flight_tokens=batches * max_num_batched_tokens,
        num_lookahead_tokens=0,
    )


def under(policy: KVPolicy, spec: KVCacheSpec = FULL_ATTENTION, **kwargs: int) -> KVCacheSpec:
    return semantic_spec(spec, ServedPolicies(policy.name, policy), sizes(**kwargs))


# -- which layers ----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FullPolicy(), StreamingPolicy(), SemanticPolicy()])
def test_a_full_attention_layer_is_put_under_the_policy(policy: KVPolicy) -> None:
    spec = replace(FULL_ATTENTION, page_size_padded=32768, non_causal=True)
    semantic = under(policy, spec, max_num_batched_tokens=256, batches=2)
    assert type(semantic) is SemanticSpec
    assert semantic.policy == policy
    assert (semantic.prefill_interval, semantic.max_in_flight_tokens) == (256, 512)
    assert semantic.page_size_bytes == spec.page_size_bytes == 32768
    for field in spec.__dataclass_fields__:
        assert getattr(semantic, field) == getattr(spec, field)


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**SHAPE, sliding_window=128),
        ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=128),
        MLAAttentionSpec(**SHAPE | {"num_kv_heads": 1}),
        # Windows that vLLM manages as full attention still forget by themselves.
        FullAttentionSpec(**SHAPE, sliding_window=128),
        FullAttentionSpec(**SHAPE, attention_chunk_size=128),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_any_other_layer_is_left_alone(spec: KVCacheSpec) -> None:
    assert under(SemanticPolicy(), spec) is spec


# -- sizing ----------------------------------------------------------------------------


def test_the_documented_bound() -> None:
    """Default policy, 32-token blocks: 1 + 2 + 6, a step of 512 tokens, the block in work."""
    spec = under(SemanticPolicy())
    assert spec.policy.budget(32).total == 9
    assert spec.max_admission_blocks == 9 + 16 + 1
    assert under(SemanticPolicy(), batches=2).max_admission_blocks == 9 + 32 + 1
    assert under(StreamingPolicy(), max_num_batched_tokens=500).max_admission_blocks == 9 + 16 + 1
    assert under(FullPolicy()).max_admission_blocks is None


@repeatable
@given(st.integers(1, 100_000), st.integers(1, 4096), st.integers(1, 2))
def test_memory_usage_is_bounded(max_model_len: int, tokens: int, batches: int) -> None:
    kwargs = {
        "max_model_len": max_model_len,
        "max_num_batched_tokens": tokens,
        "batches": batches,
    }
    needed = FULL_ATTENTION.max_memory_usage_bytes(sizes(**kwargs))
    spec = under(SemanticPolicy(), **kwargs)
    bound = spec.max_admission_blocks * spec.page_size_bytes
    assert spec.max_memory_usage_bytes(sizes(**kwargs)) == min(needed, bound)
    full = under(FullPolicy(), **kwargs)
    assert full.max_memory_usage_bytes(sizes(**kwargs)) == needed


# -- merging ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_merging_the_layers_of_a_group_keeps_the_policy(num_layers: int) -> None:
    spec = under(SemanticPolicy(semantic_tokens=96), max_num_batched_tokens=128, batches=2)
    assert SemanticSpec.merge([spec] * num_layers) == spec


def test_layers_of_different_shapes_do_not_merge() -> None:
    other = under(SemanticPolicy(), replace(FULL_ATTENTION, num_kv_heads=4))
    with pytest.raises(AssertionError):
        SemanticSpec.merge([under(SemanticPolicy()), other])


@pytest.mark.parametrize("window", [{"sliding_window": 128}, {"attention_chunk_size": 128}])
def test_a_layer_with_a_window_does_not_join_the_group(window: dict[str, int]) -> None:
    """As ``--disable-hybrid-kv-cache-manager`` would have it: it would lose its window's blocks."""
    windowed = replace(FULL_ATTENTION, **window)
    with pytest.raises(ValueError, match="--disable-hybrid-kv-cache-manager"):
        SemanticSpec.merge([under(SemanticPolicy()), windowed])


def layers(num_layers: int) -> dict[str, KVCacheSpec]:
    return {f"layers.{i}.attn": FULL_ATTENTION for i in range(num_layers)}


def groups_of(specs: dict[str, KVCacheSpec], num_groups: int) -> list[KVCacheGroupSpec]:
    """What vLLM makes of a model's layers."""
    policy = SemanticPolicy()
    served = ServedPolicies(policy.name, policy, layer_groups=num_groups)
    config = sizes()
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    config.attention_config = SimpleNamespace(hisparse_config=None)
    config.cache_config = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC, num_gpu_blocks_override=None
    )
    config.speculative_config = None
    return get_kv_cache_groups(config, semantic_specs(specs, served, config))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_vllm_gives_each_group_of_layers_a_block_table(num_groups: int) -> None:
    groups = groups_of(layers(6), num_groups)
    share = 6 // num_groups
    assert [group.layer_names for group in groups] == [
        [f"layers.{i}.attn" for i in range(g * share, (g + 1) * share)] for g in range(num_groups)
    ]
    for number, group in enumerate(groups):
        assert type(group.kv_cache_spec) is SemanticSpec
        assert group.kv_cache_spec.layer_group == number


def test_layers_with_a_window_stay_among_themselves() -> None:
    window = SlidingWindowSpec(**SHAPE, sliding_window=128)
    specs = {f"{i}": window if i % 3 else FULL_ATTENTION for i in range(12)}
    groups = groups_of(specs, 2)
    ours = [group for group in groups if isinstance(group.kv_cache_spec, SemanticSpec)]
    assert [group.layer_names for group in ours] == [["0", "3"], ["6", "9"]]
    assert {len(group.layer_names) for group in groups} == {2}


def test_layers_of_different_groups_do_not_merge() -> None:
    first, second = (group.kv_cache_spec for group in groups_of(layers(2), 2))
    assert first != second
    with pytest.raises(AssertionError, match="different groups"):
        SemanticSpec.merge([first, second])
    assert UniformTypeKVCacheSpecs.from_specs({"a": first, "b": second}) is None
    assert UniformTypeKVCacheSpecs.from_specs({"a": first, "b": first}) is not None


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "allowed"),
    [(6, 4, "1, 2, 3, 6"), (2, 3, "1, 2"), (1, 2, "1"), (0, 2, "1")],
)
def test_groups_that_are_no_equal_shares_are_refused(
    num_layers: int, num_groups: int, allowed: str
) -> None:
    message = rf"--kv-policy-config.layer_groups {num_groups} .* {num_layers} .*allowed: {allowed}$"
    with pytest.raises(ValueError, match=message):
        groups_of(layers(num_layers), num_groups)


def test_groups_of_layers_of_different_sizes_are_refused() -> None:
    specs = layers(2) | {"large": replace(FULL_ATTENTION, num_kv_heads=4)}
    specs["larger"] = specs["large"]
    assert len(groups_of(specs, 1)) == 1
    with pytest.raises(ValueError, match=r"layer_groups 2 needs .* 16384, 32768 bytes; allowed: 1"):
        groups_of(specs, 2)


def test_specs_of_different_policies_are_different() -> None:
    """vLLM groups layers by equality and hash of their specs."""
    specs = {under(SemanticPolicy()), under(SemanticPolicy()), under(StreamingPolicy())}
    assert len(specs) == 2


# -- registry --------------------------------------------------------------------------


def test_the_registry_maps_the_spec_to_our_manager() -> None:
    spec = under(SemanticPolicy())
    assert KVCacheSpecRegistry.get_manager_class(spec) is SemanticManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is FullAttentionSpec
    KVCacheSpecRegistry.check_kv_cache_spec_registry({"layer": spec})


def test_vllms_own_specs_keep_their_managers() -> None:
    managers = {
        FULL_ATTENTION: FullAttentionManager,
        SlidingWindowSpec(**SHAPE, sliding_window=128): SlidingWindowManager,
    }
    for spec, manager in managers.items():
        assert KVCacheSpecRegistry.get_manager_class(spec) is manager


def test_in_a_process_where_ours_registers_first(repo: Path) -> None:
    """Registering into an empty registry would make vLLM skip its own specs."""
    code = """
import vllm_semantic.engine.spec
from vllm.v1 import kv_cache_spec_registry as registry
from vllm.v1.kv_cache_interface import *
names = {cls.__name__ for cls in registry._REGISTRY_KVCACHESPEC_LIST}
assert {"SemanticSpec", "FullAttentionSpec", "SlidingWindowSpec", "MambaSpec"} <= names, names
manager = registry._REGISTRY_KVCACHESPEC_LIST[FullAttentionSpec].manager_class
assert manager.__name__ == "FullAttentionManager", manager
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_an_admission_asks_for_no_more_than_a_request_may_hold() -> None:
    """Whatever it asked for itself; vLLM has one cap for all, and for its own specs only."""
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=32)
    small = SemanticPolicy(semantic_tokens=64)
    for policy, bound, bound_of_small in ((SemanticPolicy(), 26, 24), (FullPolicy(), 128, 24)):
        manager = get_manager_for_kv_cache_spec(
            under(policy),
            max_in_flight_tokens=512,
            max_model_len=8192,
            block_pool=pool,
            enable_caching=True,
            kv_cache_group_id=0,
            scheduler_block_size=32,
        )
        assert type(manager) is SemanticManager
        manager.requests = {"small": SimpleNamespace(kv_policy=small), "other": SimpleNamespace()}
        for request_id, most in (("small", bound_of_small), ("other", bound)):
            for capped, expected in ((True, most), (False, 128)):
                assert expected == manager.get_num_blocks_to_allocate(
                    request_id, 4096, [], 0, 0, 4096, apply_admission_cap=capped
                )


def test_a_block_size_too_coarse_for_the_policy_is_refused() -> None:
    spec = under(SemanticPolicy(recent_tokens=64), replace(FULL_ATTENTION, block_size=128))
    with pytest.raises(ValueError, match=r"--block-size 128 is too coarse.*recent_tokens 64"):
        SemanticManager(spec)
