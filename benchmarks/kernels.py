"""The device's kernels against their references in plain torch, on random inputs."""

from __future__ import annotations

import torch

from vllm_semantic.ops.cached_blocks import CachedBlocks, CachedLayers
from vllm_semantic.ops.scoring import (
    cached_attention,
    cached_contribution,
    cached_mean_key_cosine,
    mean_key_cosine,
)
from vllm_semantic.policies import BlockView


def compare(device: torch.device) -> dict[str, float]:
    """Largest differences of scores, by dtype and head size."""
    generator = torch.Generator(device).manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_size in (64, 80, 128, 256):
            for name, difference in _scoring(device, generator, dtype, head_size).items():
                found[f"{name} {str(dtype).removeprefix('torch.')} {head_size}"] = difference
    return found


def _scoring(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, head_size: int
) -> dict[str, float]:
    num_layers, num_heads, num_kv_heads, num_reqs, held, window = 4, 32, 8, 16, 20, 8
    scale = head_size**-0.5
    rows = num_reqs * window
    queries = torch.randn(
        num_layers, rows, num_heads, head_size, generator=generator, device=device
    ).to(dtype)
    shape = (num_layers, 400, num_kv_heads, 16, 2 * head_size)
    both = torch.randn(shape, generator=generator, device=device).to(dtype)
    keys, values = both.split(head_size, dim=-1)
    cached = CachedBlocks(
        CachedLayers(queries, keys, kernel_blocks=1, scale=scale, values=values),
        windows=torch.randperm(rows, generator=generator, device=device).view(num_reqs, window),
        num_tokens=torch.full((num_reqs,), held * 16, device=device),
        block_ids=torch.randperm(400, generator=generator, device=device)[: num_reqs * held],
        requests=torch.arange(num_reqs, device=device).repeat_interleave(held),
        first_positions=torch.arange(held, device=device).repeat(num_reqs) * 16,
    )
    cosines, attention, contribution = [], [], []
    for request in range(num_reqs):
        mine = cached.block_ids[cached.requests == request]
        gathered, read = keys[:, mine].float(), values[:, mine].float()
        view = BlockView(
            queries[:, cached.windows[request]].float(),
            gathered,
            read.clone,
            torch.arange(held, device=device),
            held * 16,
            scale,
        )
        cosines.append(mean_key_cosine(view.queries[:, -1], gathered))
        attention.append(view.attention().sum(4).mean((1, 2)))
        contribution.append(view.contributions().mean((1, 2)))
    pairs = {
        "cosine": (cached_mean_key_cosine(cached), cosines),
        "attention": (cached_attention(cached), attention),
        "contribution": (cached_contribution(cached), contribution),
    }
    return {
        name: 0.0 if scores is None else float((scores - torch.cat(expected, 1)).abs().max())
        for name, (scores, expected) in pairs.items()
    }
