"""What goes to host memory comes back as it was, whatever group and place it is in."""

from __future__ import annotations

import pytest
import torch

from vllm_semantic.engine import host_blocks
from vllm_semantic.engine.cached_kv import CachedKV
from vllm_semantic.engine.host_blocks import HostBlocks
from vllm_semantic.messages import BlockCopy, HostCopies

from ..platforms import on_gpu

DEVICE = torch.device("cuda" if on_gpu() else "cpu")
HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS = 16, 4, 12


def cache(num_layers: int, kernel_blocks: int = 1, dtype: torch.dtype = torch.float32) -> CachedKV:
    shape = (num_layers, NUM_BLOCKS * kernel_blocks, 2, BLOCK_SIZE, 2 * HEAD_SIZE)
    return CachedKV(torch.randn(shape).to(dtype).to(DEVICE), HEAD_SIZE, kernel_blocks)


@pytest.mark.parametrize("kernel_blocks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_and_back(kernel_blocks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    groups = {g: [cache(n, kernel_blocks, dtype) for n in (3, 1)] for g in (0, 2)}
    host = HostBlocks(groups, 5, DEVICE)
    block_bytes = 4 * kernel_blocks * 2 * BLOCK_SIZE * 2 * HEAD_SIZE * dtype.itemsize
    assert host.num_bytes == 5 * block_bytes

    def blocks(group: int, block_id: int) -> list[torch.Tensor]:
        places = slice(block_id * kernel_blocks, (block_id + 1) * kernel_blocks)
        return [of.kv_cache[:, places].clone() for of in groups[group]]

    before = {(g, i): blocks(g, i) for g in groups for i in range(NUM_BLOCKS)}
    out = [BlockCopy(0, 7, 4), BlockCopy(2, 3, 0), BlockCopy(0, 1, 2)]
    # What has just been copied out may be overwritten by what comes back.
    back = [BlockCopy(0, 1, 4), BlockCopy(2, 9, 0)]
    host.copy(HostCopies(out, back))
    came = {(0, 1): (0, 7), (2, 9): (2, 3)}
    for place, expected in before.items():
        for is_now, was in zip(blocks(*place), before[came.get(place, place)], strict=True):
            assert torch.equal(is_now, was), (place, expected)
    for side, of in enumerate(host.caches(0)):
        on_device, ids = host.on_device(of, [2, 4])
        keys = on_device.gather_keys(ids.to(on_device.kv_cache.device))
        gone = [torch.stack(list(before[0, i][side])) for i in (1, 7)]
        expected_keys = torch.cat(gone, dim=1)[..., :HEAD_SIZE]
        assert torch.equal(
            keys, expected_keys.unflatten(1, (2, kernel_blocks)).transpose(2, 3).flatten(3, 4)
        )


def test_many_blocks_go_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_blocks, "MAX_STAGED", 1)
    of = cache(2)
    host = HostBlocks({0: [of]}, NUM_BLOCKS, DEVICE)
    before = of.kv_cache.clone()
    host.copy(HostCopies([BlockCopy(0, i, i) for i in range(NUM_BLOCKS)], []))
    of.kv_cache.zero_()
    turned = [BlockCopy(0, NUM_BLOCKS - 1 - i, i) for i in range(NUM_BLOCKS)]
    host.copy(HostCopies([], turned))
    assert torch.equal(of.kv_cache, before.flip(1))


def test_groups_that_are_not_alike_cannot_share_slots() -> None:
    with pytest.raises(ValueError, match="alike"):
        HostBlocks({0: [cache(2)], 1: [cache(3)]}, 4, DEVICE)
