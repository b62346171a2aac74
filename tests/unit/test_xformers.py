"""The XFORMERS backend: its masks, tables and views against plain attention per request.

xformers' biases are materialised here; its decode kernel runs in a process of its own,
through Triton's interpreter. Its prefill operators need a GPU.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

from vllm_semantic.engine.xformers_backend import (
    HEAD_SIZES,
    XFormersBackend,
    XFormersImpl,
    XFormersMetadata,
    XFormersMetadataBuilder,
)
from vllm_semantic.engine.xformers_calls import (
    PAGE_MULTIPLE,
    Call,
    gathered_keys_and_values,
    paged_keys_and_values,
    plan_calls,
    power_of_two,
)

fmha = pytest.importorskip("xformers.ops.fmha")
triton = pytest.importorskip("triton")

PAGE_SIZE = 64
KV_HEADS, GROUP, HEAD_SIZE = 2, 3, 32
FULL = FullAttentionSpec(
    block_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float16
)


class Step:
    """A ragged step over a cache whose pages lie in no order; page 0 is the null block.

    Unused entries of a row name the null block or, as in a real table, pages of others.
    """

    def __init__(
        self,
        query_lens: list[int],
        seq_lens: list[int],
        *,
        stale: bool = False,
        kv_heads: int = KV_HEADS,
        group: int = GROUP,
        head_size: int = HEAD_SIZE,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(sum(seq_lens))
        self.query_lens, self.seq_lens, self.page_size = query_lens, seq_lens, page_size
        num_pages = [-(-length // page_size) for length in seq_lens]
        pages = (1 + torch.randperm(sum(num_pages))).split(num_pages)
        width = max(num_pages) + 1
        self.block_table = torch.zeros(len(seq_lens), width, dtype=torch.int32)
        if stale:
            self.block_table[:] = torch.randint(0, sum(num_pages) + 1, self.block_table.shape)
        for row, owned in zip(self.block_table, pages, strict=True):
            row[: len(owned)] = owned
        shape = (1 + sum(num_pages), page_size, kv_heads, 2 * head_size)
        self.kv_cache = torch.randn(shape, dtype=dtype).transpose(1, 2)
        self.query = torch.randn(sum(query_lens), kv_heads * group, head_size, dtype=dtype)
        self.scale = head_size**-0.5

    def plan(self) -> list[Call]:
        return plan_calls(self.query_lens, self.seq_lens, self.block_table, self.page_size)

    def reference(self) -> torch.Tensor:
        """Causal attention, one request and one query at a time."""
        out, start = torch.empty_like(self.query, dtype=torch.float32), 0
        kv_heads = self.kv_cache.shape[1]
        for row, query_len, seq_len in zip(
            self.block_table.tolist(), self.query_lens, self.seq_lens, strict=True
        ):
            if not query_len:
                continue
            slots = [(row[i // self.page_size], i % self.page_size) for i in range(seq_len)]
            kept = torch.stack([self.kv_cache[page, :, offset] for page, offset in slots])
            keys, values = kept.float().chunk(2, dim=-1)  # [seq_len, kv_heads, head_size]
            group = self.query.shape[1] // kv_heads
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
            for i in range(query_len):
                end = seq_len - query_len + i + 1
                scores = torch.einsum("hd,khd->hk", self.query[start + i].float(), keys[:end])
                weights = (scores * self.scale).softmax(-1)
                out[start + i] = torch.einsum("hk,khd->hd", weights, values[:end])
            start += query_len
        return out

    def materialised(self) -> torch.Tensor:
        """What the planned calls say, with each bias as a matrix."""
        out = torch.full_like(self.query, float("nan"))
        for call in self.plan():
            query, keys, values = (
                x[0].flatten(1, 2) for x in call.inputs(self.query, self.kv_cache)
            )
            mask = materialise(call, len(query))
            keys, values = keys[: mask.shape[1]], values[: mask.shape[1]]
            scores = torch.einsum("qhd,khd->hqk", query, keys) * self.scale + mask
            attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            out[call.tokens] = attended[: call.tokens.stop - call.tokens.start]
        return out


def materialise(call: Call, num_queries: int) -> torch.Tensor:
    """The mask over ``[queries, keys of the cache]`` or ``[queries, gathered keys]``."""
    logical = len(call.bias.k_seqinfo.seqlen_py) * call.bias.k_seqinfo.padding
    return call.bias.materialize((num_queries, logical))


# -- masks and tables ------------------------------------------------------------------

STEPS = {
    "one token": ([1], [1]),
    "one decode": ([1], [200]),
    "decodes": ([1, 1, 1], [65, 1, 300]),
    "full pages": ([1, 1], [64, 128]),
    "several new tokens each": ([5, 5, 5], [5, 69, 130]),
    "as many queries as split-K takes": ([16], [64]),
    "one query more": ([17], [64]),
    "prefill": ([100], [100]),
    "chunk after a prefix": ([40], [170]),
    "ragged prefill": ([30, 1, 70], [30, 129, 200]),
    "decodes, then prefill": ([1, 1, 1, 33, 80], [5, 150, 64, 33, 190]),
    "padding requests": ([1, 20, 0, 0], [70, 90, 0, 0]),
}


@pytest.mark.parametrize(("query_lens", "seq_lens"), STEPS.values(), ids=STEPS)
def test_step(query_lens: list[int], seq_lens: list[int]) -> None:
    step = Step(query_lens, seq_lens)
    torch.testing.assert_close(step.materialised(), step.reference())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_decodes=st.integers(0, 5),
    prefills=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), max_size=3),
    data=st.data(),
)
def test_ragged_steps(num_decodes: int, prefills: list[tuple[int, int]], data: Any) -> None:
    query_lens = [1] * num_decodes + [new for new, _ in prefills]
    seq_lens = data.draw(
        st.lists(st.integers(1, 200), min_size=num_decodes, max_size=num_decodes)
    ) + [new + before for new, before in prefills]
    if query_lens:
        step = Step(query_lens, seq_lens)
        torch.testing.assert_close(step.materialised(), step.reference())


def test_decodes_stay_in_place() -> None:
    decodes, rest = Step([1, 1, 1, 33, 80], [5, 150, 64, 33, 190]).plan()
    assert type(decodes.bias) is fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    assert decodes.pages is None and decodes.tokens == slice(0, 3)
    assert type(rest.bias) is fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
    assert rest.pages.shape == (2, 3) and rest.tokens == slice(3, 116)


def test_pages_behind_a_sequence_are_not_gathered() -> None:
    """A row keeps what longer requests left in it; such a page may be anyone's."""
    step = Step([30, 70], [30, 200], stale=True)
    (call,) = step.plan()
    assert call.pages.tolist() == [
        [step.block_table[0, 0].item(), 0, 0, 0],
        step.block_table[1, :4].tolist(),
    ]
    torch.testing.assert_close(step.materialised(), step.reference())


def test_few_shapes_of_decode() -> None:
    """The kernel is compiled for each; powers of two keep them few."""
    shapes = set()
    for num_reqs in range(1, 33):
        for length in range(1, 2048, 100):
            table = torch.zeros(num_reqs, 32, dtype=torch.int32)
            (call,) = plan_calls([1] * num_reqs, [length] * num_reqs, table, PAGE_SIZE)
            assert call.num_padding == power_of_two(num_reqs) - num_reqs
            shapes.add(tuple(call.bias.block_tables.shape))
    assert shapes == {(2**i, 2**j) for i in range(6) for j in range(6)}


# -- views -----------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3])
def test_views_share_memory_and_repeat_heads(group: int) -> None:
    step = Step([1], [200], group=group)
    pages = step.kv_cache.transpose(1, 2)
    for half, view in enumerate(paged_keys_and_values(step.kv_cache, group)):
        assert view.untyped_storage().data_ptr() == step.kv_cache.untyped_storage().data_ptr()
        expected = pages.flatten(0, 1)[..., half * HEAD_SIZE : (half + 1) * HEAD_SIZE]
        repeated = expected.repeat_interleave(group, dim=1)
        assert torch.equal(view[0].flatten(1, 2), repeated)
        assert group == 1 or view.stride(3) == 0
    step.kv_cache[2, 1, 5] = 7
    keys, values = paged_keys_and_values(step.kv_cache, group)
    slot = 2 * PAGE_SIZE + 5
    assert (keys[0, slot, 1] == 7).all() and (values[0, slot, 1] == 7).all()


def test_gathered_pages() -> None:
    step = Step([1], [200])
    pages = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    keys, values = gathered_keys_and_values(step.kv_cache, pages, GROUP)
    cache = step.kv_cache.transpose(1, 2)
    expected = torch.cat([cache[page] for page in (3, 1, 0, 2)])
    expected = expected.repeat_interleave(GROUP, dim=1)
    assert torch.equal(torch.cat([keys, values], -1)[0].flatten(1, 2), expected)
    assert keys.stride(3) == values.stride(3) == 0


@pytest.mark.parametrize("layout", [each for each in KVCacheLayout if each.is_block_compact])
def test_only_the_declared_layout_can_be_viewed(layout: KVCacheLayout) -> None:
    num_blocks, layers = 4, ["first", "second"]
    page = FULL.page_size_bytes
    layer_stride, block_stride = (
        (num_blocks * page, page) if layout.is_layer_compact else (page, len(layers) * page)
    )
    size = num_blocks * len(layers) * page
    tensor = KVCacheTensor(
        size=size, layers=layers, layer_stride=layer_stride, block_stride=block_stride
    )
    raw = torch.zeros(size, dtype=torch.int8)
    kv_cache = create_kv_cache_views(raw, FULL, num_blocks, layout, tensor)[1]
    assert kv_cache.shape == (num_blocks, KV_HEADS, PAGE_SIZE, 2 * HEAD_SIZE)
    if layout in XFormersBackend.supported_kv_cache_layouts():
        keys, _ = paged_keys_and_values(kv_cache, GROUP)
        assert keys.shape == (1, num_blocks * PAGE_SIZE, KV_HEADS, GROUP, HEAD_SIZE)
    else:
        with pytest.raises(ValueError, match="allowed: layout LBNHC"):
            paged_keys_and_values(kv_cache, GROUP)


# -- what xformers says of our inputs --------------------------------------------------


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(
    ("query_len", "page_size", "group"), [(1, 64, 4), (16, 128, 1), (3, 192, 8)]
)
def test_split_k_refuses_nothing_but_the_device(
    head_size: int, query_len: int, page_size: int, group: int
) -> None:
    step = Step(
        [query_len] * 3,
        [300, 17, 64],
        head_size=head_size,
        page_size=page_size,
        group=group,
        dtype=torch.float16,
    )
    (call,) = step.plan()
    inputs = fmha.Inputs(*call.inputs(step.query, step.kv_cache), attn_bias=call.bias, scale=0.1)
    inputs.validate_inputs()
    reasons = fmha.triton_splitk.FwOp.not_supported_reasons(inputs)
    assert reasons == ["device=cpu (supported: {'cuda'})"]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 4])
def test_an_operator_for_prefill_refuses_nothing_but_this_machine(
    head_size: int, group: int
) -> None:
    step = Step([30, 70], [30, 200], head_size=head_size, group=group, dtype=torch.float16)
    (call,) = step.plan()
    inputs = fmha.Inputs(*call.inputs(step.query, step.kv_cache), attn_bias=call.bias, scale=0.1)
    inputs.validate_inputs()
    for op in (fmha.flash.FwOp, fmha.cutlass.FwOp):
        reasons = set(op.not_supported_reasons(inputs))
        # Built without CUDA, torch here has neither operator.
        assert reasons <= {
            "device=cpu (supported: {'cuda'})",
            "operator wasn't built - see `python -m xformers.info` for more info",
        }


# -- vLLM's interface ------------------------------------------------------------------


def impl(**changes: Any) -> XFormersImpl:
    options = {"num_heads": 6, "head_size": HEAD_SIZE, "scale": 0.1, "num_kv_heads": KV_HEADS}
    return XFormersImpl(**options | changes)


def builder(**config: Any) -> XFormersMetadataBuilder:
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    vllm_config = SimpleNamespace(
        **{"speculative_config": None, "parallel_config": parallel} | config
    )
    return XFormersMetadataBuilder(FULL, ["layer"], vllm_config, torch.device("cpu"))


@pytest.fixture
def cpu_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmha.triton_splitk.FwOp, "SUPPORTED_DEVICES", {"cpu"})


def common_metadata(step: Step, **changes: Any) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *step.query_lens]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(step.seq_lens, dtype=torch.int32)
    options = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        # On the device: reading it would be a wait, and here an error.
        "seq_lens": seq_lens.to("meta"),
        "seq_lens_cpu_upper_bound": seq_lens,
        "num_reqs": len(step.query_lens),
        "num_actual_tokens": sum(step.query_lens),
        "max_query_len": max(step.query_lens),
        "max_seq_len": max(step.seq_lens),
        "block_table_tensor": step.block_table,
        "slot_mapping": torch.zeros(sum(step.query_lens), dtype=torch.int64),
    }
    return CommonAttentionMetadata(**options | changes)


@pytest.mark.usefixtures("cpu_allowed")
def test_builder_plans_from_lengths_on_the_host() -> None:
    step = Step([1, 1, 33], [5, 150, 190])
    metadata = builder().build(0, common_metadata(step))
    assert metadata.num_actual_tokens == 35
    for built, planned in zip(metadata.calls, step.plan(), strict=True):
        assert built.tokens == planned.tokens
        assert built.num_padding == planned.num_padding
        length = (built.tokens.stop - built.tokens.start) + built.num_padding
        assert torch.equal(materialise(built, length), materialise(planned, length))


@pytest.mark.usefixtures("cpu_allowed")
@pytest.mark.parametrize("changes", [{"causal": False}, {"seq_lens_cpu_upper_bound": None}])
def test_builder_refuses_steps(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--attention-backend XFORMERS"):
        builder().build(0, common_metadata(Step([1], [5]), **changes))


@pytest.mark.usefixtures("cpu_allowed")
def test_builder_refuses_speculation() -> None:
    with pytest.raises(ValueError, match="--speculative-config"):
        builder(speculative_config=object())


def test_builder_says_why_xformers_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"cannot run here: device=cpu \(supported"):
        builder()


def test_profiling_run() -> None:
    output = torch.ones(4, 6 * HEAD_SIZE)
    empty = torch.empty(0)
    assert not impl().forward(None, empty, empty, empty, empty, None, output).any()


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"head_size": 80}, "head size 80"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 128}, "sliding windows"),
        ({"logits_soft_cap": 30.0}, "soft-capped logits"),
        ({"sinks": torch.zeros(6)}, "attention sinks"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ],
)
def test_layer_refuses(feature: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        impl(**feature)


def test_layer_refuses_quantised_output() -> None:
    empty = torch.empty(0)
    with pytest.raises(NotImplementedError, match="quantised output"):
        impl().forward(None, empty, empty, empty, empty, None, empty, torch.ones(1))


SUPPORTED = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 64,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": DeviceCapability(8, 0),
    "attn_type": AttentionType.DECODER,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"device_capability": DeviceCapability(9, 0)}, {"block_size": None}, {"block_size": 192}],
)
def test_configurations(changes: dict[str, Any]) -> None:
    assert XFormersBackend.validate_configuration(**SUPPORTED | changes) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_size": 96}, "head_size not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype float16 differs from dtype"),
        ({"block_size": 32}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
        ({"attn_type": AttentionType.ENCODER}, "attention type"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
)
def test_configurations_refused(change: dict[str, Any], reason: str) -> None:
    reasons = XFormersBackend.validate_configuration(**SUPPORTED | change)
    assert any(reason in given for given in reasons), reasons


def test_without_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        impl()
    (reason,) = XFormersBackend.validate_configuration(**SUPPORTED)
    assert "pip install xformers" in reason


def test_names() -> None:
    assert XFormersBackend.get_name() == "XFORMERS"
    assert XFormersBackend.get_impl_cls() is XFormersImpl
    assert XFormersBackend.get_builder_cls() is XFormersMetadataBuilder
    assert XFormersMetadataBuilder._cudagraph_support is AttentionCGSupport.NEVER
    assert XFormersBackend.get_preferred_block_size(16) == PAGE_MULTIPLE
    assert fmha.triton_splitk.FwOp.BLOCK_N == PAGE_MULTIPLE


# -- the decode kernel, interpreted ----------------------------------------------------


def has_block_pointers() -> bool:
    """Triton 3.9 raises in place of the block pointers that xformers 0.0.35 is written with."""
    return "NotImplementedError" not in inspect.getsource(triton.language.make_block_ptr)


@pytest.mark.skipif(not has_block_pointers(), reason="Triton without block pointers")
def test_decode_kernel(repo: Path) -> None:
    """Triton decides at import whether it interprets, so a process of its own does."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "XFORMERS_ENABLE_TRITON": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_xformers"],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "decodes agree"


def decode_through_kernel() -> None:
    """Layers as on a GPU, except that split-K is told that it may run here."""
    fmha.triton_splitk.FwOp.SUPPORTED_DEVICES = {"cpu"}
    for query_lens, seq_lens, group in (
        ([1], [1], 4),
        ([1, 1, 1], [65, 1, 300], 4),
        ([1, 1], [64, 129], 1),
        ([3, 3, 3], [3, 69, 130], 2),
        ([16], [80], 3),
    ):
        step = Step(query_lens, seq_lens, stale=True, group=group, dtype=torch.float16)
        num_heads = KV_HEADS * group
        layer = impl(num_heads=num_heads, scale=step.scale)
        output = torch.full((len(step.query) + 2, num_heads * HEAD_SIZE), 7.0, dtype=torch.float16)
        padded = torch.cat([step.query, step.query[:1], step.query[:1]])
        metadata = XFormersMetadata(step.plan(), len(step.query))
        layer.forward(None, padded, padded, padded, step.kv_cache, metadata, output)
        actual = output[: len(step.query)].view_as(step.query).float()
        torch.testing.assert_close(actual, step.reference(), atol=4e-3, rtol=4e-3)
        assert (output[len(step.query) :] == 7).all()
    print("decodes agree")


if __name__ == "__main__":
    decode_through_kernel()
