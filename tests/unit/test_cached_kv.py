"""Keys and values that vLLM's own op wrote to random slots are read back exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as custom_ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from vllm_semantic.engine.cached_kv import (
    FP8_DTYPES,
    CachedKV,
    Loop,
    Packing,
    Quantized,
    cpu_packing,
    head_scales,
    stack_layers,
)

pytestmark = pytest.mark.cpu_build("its attention kernels write the cache")

NUM_LAYERS = 2
NUM_KERNEL_BLOCKS = 12
HEAD_SIZES = [32, 64, 80, 128]


def empty_cache(
    dtype: torch.dtype, block_size: int, head_size: int, num_kv_heads: int
) -> torch.Tensor:
    """``[num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]``, as vLLM has it."""
    shape = (NUM_LAYERS, NUM_KERNEL_BLOCKS, num_kv_heads, block_size, 2 * head_size)
    return torch.zeros(shape, dtype=dtype)


def write_random(
    kv_cache: torch.Tensor,
    seed: int,
    dtype: torch.dtype | None = None,
    kv_cache_dtype: str = "auto",
    scales: tuple[float, float] = (1.0, 1.0),
) -> torch.Tensor:
    """Fill one layer's cache as the CPU backend does.

    Args:
        kv_cache: of one layer.
        seed: of the numbers.
        dtype: of keys and values; ``None``: the cache's.
        kv_cache_dtype: as ``--kv-cache-dtype`` has it.
        scales: of keys and of values.

    Returns:
        Keys and values ``[2, num_blocks, block_size, num_kv_heads, head_size]``.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_blocks * block_size
    flat = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, head_size)
    key_cache, value_cache = flat.chunk(2, dim=2)
    keys, values = (
        torch.randn(num_slots, num_kv_heads, head_size, generator=generator).to(
            dtype or kv_cache.dtype
        )
        for _ in range(2)
    )
    slots = torch.randperm(num_slots, generator=generator)
    isa = _get_attn_isa(keys.dtype, block_size, head_size, kv_cache_dtype)
    # Half at once and the rest one by one: as in prefill and as in decode.
    middle = num_slots // 2
    for part in (slice(0, middle), *(slice(i, i + 1) for i in range(middle, num_slots))):
        custom_ops.cpu_attn_reshape_and_cache(
            keys[part],
            values[part],
            key_cache,
            value_cache,
            slots[part],
            isa,
            *scales,
            kv_cache_dtype,
        )
    by_slot = torch.empty(2, *keys.shape, dtype=keys.dtype)
    by_slot[:, slots] = torch.stack((keys, values))
    return by_slot.view(2, num_blocks, block_size, num_kv_heads, head_size)


def reader(kv_cache: torch.Tensor, kernel_blocks: int) -> CachedKV:
    block_size, head_size = kv_cache.shape[3], kv_cache.shape[4] // 2
    isa = _get_attn_isa(kv_cache.dtype, block_size, head_size)
    packing = cpu_packing(block_size, head_size, kv_cache.dtype, isa)
    return CachedKV(kv_cache, head_size, kernel_blocks, packing)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_come_back(
    dtype: torch.dtype, block_size: int, head_size: int, num_kv_heads: int
) -> None:
    kv_cache = empty_cache(dtype, block_size, head_size, num_kv_heads)
    written = torch.stack([write_random(layer, seed) for seed, layer in enumerate(kv_cache)], 1)
    block_ids = torch.tensor([3, 0, 5, 3, 1])
    for kernel_blocks in (1, 2):
        cache = reader(kv_cache, kernel_blocks)
        # A block of the manager is this many kernel blocks in a row.
        shape = (NUM_LAYERS, -1, kernel_blocks * block_size, num_kv_heads, head_size)
        for half, gather in zip(written, (cache.gather_keys, cache.gather_values), strict=True):
            gathered = gather(block_ids)
            expected = half.view(shape)[:, block_ids].transpose(2, 3).float()
            assert gathered.dtype == torch.float32
            assert torch.equal(gathered, expected)


@pytest.mark.parametrize("kv_cache_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_is_read_with_its_scales(dtype: torch.dtype, kv_cache_dtype: str) -> None:
    """What was written, divided by its scale and rounded to fp8, times that scale again."""
    scales = torch.tensor([[0.5, 0.03], [2.0, 0.125]])  # of each layer, keys and values
    kv_cache = empty_cache(torch.uint8, 32, 64, 2)
    written = torch.stack(
        [
            write_random(layer, seed, dtype, kv_cache_dtype, tuple(of.tolist()))
            for seed, (layer, of) in enumerate(zip(kv_cache, scales, strict=True))
        ],
        1,
    )
    fp8 = FP8_DTYPES[kv_cache_dtype]
    isa = _get_attn_isa(dtype, 32, 64, kv_cache_dtype)
    packing = cpu_packing(32, 64, dtype, isa, kv_cache_dtype)
    ids = torch.tensor([3, 0, 5])
    for kernel_blocks in (1, 2):
        of_heads = (of.unsqueeze(1).expand(-1, 2) for of in scales.t())
        cache = CachedKV(kv_cache, 64, kernel_blocks, packing, Quantized(fp8, *of_heads))
        shape = (NUM_LAYERS, -1, kernel_blocks * 32, 2, 64)
        gathers = (cache.gather_keys, cache.gather_values)
        for half, gather, of in zip(written, gathers, scales.t(), strict=True):
            of_layer = of.view(-1, 1, 1, 1, 1)
            stored = (half.view(shape)[:, ids].transpose(2, 3).float() / of_layer).to(fp8).float()
            # Kernels round as they like: one step of fp8, and one below its normal numbers.
            step, least = (2**-2, 2**-16) if fp8 is torch.float8_e5m2 else (2**-3, 2**-9)
            atol = least * float(of.max())
            torch.testing.assert_close(gather(ids), stored * of_layer, rtol=step, atol=atol)
    one = cache.layers(slice(1, 2))
    assert torch.equal(one.gather_keys(ids), cache.gather_keys(ids)[1:])


@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_no_block_holds_nothing(kernel_blocks: int) -> None:
    kv_cache = empty_cache(torch.float32, 32, 64, 2)
    cache = reader(kv_cache, kernel_blocks)
    for gather in (cache.gather_keys, cache.gather_values):
        gathered = gather(torch.tensor([], dtype=torch.long))
        assert gathered.shape == (NUM_LAYERS, 0, 2, 32 * kernel_blocks, 64)


def test_the_head_sizes_are_those_of_the_backend() -> None:
    assert set(HEAD_SIZES) <= set(CPUAttentionBackend.get_supported_head_sizes())


@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_the_packing_visits_each_token_and_channel_once(isa: str) -> None:
    for loops in cpu_packing(32, 64, torch.float32, isa):
        visited = [(0, 0)]
        for loop in reversed(loops):
            visited = [
                (token + i * loop.tokens, channel + i * loop.channels)
                for i in range(loop.size)
                for token, channel in visited
            ]
        assert sorted(visited) == [(token, channel) for token in range(32) for channel in range(64)]


def test_any_packing_will_do() -> None:
    """Not only that of the machine that runs this: pairs of channels in tiles of four tokens."""
    block_size, head_size = 8, 4
    tiled = (Loop(2, 4, 0), Loop(2, 0, 2), Loop(4, 1, 0), Loop(2, 0, 1))
    cache = CachedKV(
        torch.randn(NUM_LAYERS, 4, 3, block_size, 2 * head_size).bfloat16(),
        head_size,
        1,
        Packing(tiled, tiled[::-1]),
    )
    assert cache.keys is None
    ids = torch.tensor([2, 1])
    packed = cache.kv_cache[:, ids].flatten(3).float()
    keys, values = cache.gather_keys(ids), cache.gather_values(ids)
    for token in range(block_size):
        for channel in range(head_size):
            tile, pair = divmod(token, 4), divmod(channel, 2)
            at = ((tile[0] * 2 + pair[0]) * 4 + tile[1]) * 2 + pair[1]
            assert torch.equal(keys[..., token, channel], packed[..., at])
            at = ((pair[1] * 4 + tile[1]) * 2 + pair[0]) * 2 + tile[0]
            assert torch.equal(values[..., token, channel], packed[..., 32 + at])


def test_keys_next_to_their_values_need_no_packing() -> None:
    """The layout of vLLM's GPU backends."""
    kv_cache = torch.randn(NUM_LAYERS, 6, 2, 16, 2 * 8)
    cache = CachedKV(kv_cache, 8, 1)
    ids = torch.tensor([4, 1])
    assert torch.equal(cache.gather_keys(ids), kv_cache[:, ids, :, :, :8])
    assert torch.equal(cache.gather_values(ids), kv_cache[:, ids, :, :, 8:])
    gathered = CachedKV(kv_cache, 8, 3).gather_keys(torch.tensor([1]))
    expected = torch.cat([kv_cache[:, i, :, :, :8] for i in (3, 4, 5)], dim=2)
    assert torch.equal(gathered[:, 0], expected)


def test_a_layout_that_loses_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kernel stored keys rounded, or not at all."""
    monkeypatch.setattr(custom_ops, "cpu_attn_reshape_and_cache", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"\(vec, torch.float32\).*--kv-policy cannot read"):
        cpu_packing(32, 32, torch.float32, "vec")


# -- layers at equal distances ---------------------------------------------------------


def assert_views(stacked: list[torch.Tensor], kv_caches: list[torch.Tensor]) -> None:
    """The stacks hold the layers in order, and are the same memory."""
    layers = [layer for stack in stacked for layer in stack]
    for layer, kv_cache in zip(layers, kv_caches, strict=True):
        assert (layer.data_ptr(), layer.shape, layer.stride()) == (
            kv_cache.data_ptr(),
            kv_cache.shape,
            kv_cache.stride(),
        )


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["layer-by-layer", "block-by-block"])
def test_layers_of_one_allocation_are_one_view(num_layers: int, order: tuple[int, int]) -> None:
    memory = torch.randn(num_layers * 4 * 2 * 3 * 8)
    shape = [num_layers, 4] if order == (0, 1) else [4, num_layers]
    kv_caches = list(memory.view(*shape, 2, 3, 8).permute(*order, 2, 3, 4))
    stacked = stack_layers(kv_caches)
    assert len(stacked) == 1
    assert_views(stacked, kv_caches)


def test_what_cannot_be_one_view_stays_apart() -> None:
    memory = torch.randn(6, 4, 2, 3, 8)
    for kv_caches in (
        [memory[0], memory[1], memory[3]],  # unequal distances
        [memory[2], memory[1], memory[0]],  # backwards
        [memory[0], memory[1].clone()],  # another allocation
        [memory[0], memory[1, :2]],  # another shape
        [memory[0], memory[1].view(torch.int32)],  # another dtype
    ):
        stacked = stack_layers(kv_caches)
        assert len(stacked) == len(kv_caches)
        assert_views(stacked, kv_caches)


def test_layers_that_share_a_cache() -> None:
    memory = torch.randn(4, 2, 3, 8)
    assert_views(stack_layers([memory, memory]), [memory, memory])


@pytest.mark.parametrize("per_head", [True, False])
def test_scales_are_what_the_backend_takes(per_head: bool) -> None:
    """One for each head, as llm-compressor writes them, or their maximum; or one for a layer."""
    kv_cache = torch.empty(0)

    def layer(scales: list[float]) -> Any:
        return SimpleNamespace(
            attn_backend=SimpleNamespace(supports_per_head_quant_scales=lambda: per_head),
            num_kv_heads=2,
            kv_cache=kv_cache,
            _k_scale=torch.tensor(scales),
            _k_scale_float=max(scales),
        )

    found = head_scales([layer([0.5, 2.0]), layer([3.0])], "_k_scale")
    assert found.tolist() == [[0.5 if per_head else 2.0, 2.0], [3.0, 3.0]]
