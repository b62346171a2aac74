"""The device's kernels against their references in plain torch, on random inputs."""

from __future__ import annotations

import torch

from vllm_semantic.ops.compaction import compact_block_table, compacted
from vllm_semantic.ops.scoring import cached_mean_key_cosine, mean_key_cosine


def compare(device: torch.device) -> dict[str, float]:
    """Largest differences; scores also between dtypes and head sizes.

    Raises:
        AssertionError: compaction, which is exact, differs.
    """
    generator = torch.Generator(device).manual_seed(0)
    found = {"compaction": _compaction(device, generator)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_size in (64, 80, 128, 256):
            name = f"scoring {str(dtype).removeprefix('torch.')} {head_size}"
            found[name] = _scoring(device, generator, dtype, head_size)
    return found


def _compaction(device: torch.device, generator: torch.Generator) -> float:
    num_reqs, width, block_size = 64, 5000, 16
    table = torch.randint(1, 1 << 20, (num_reqs, width), generator=generator, device=device)
    holes = torch.rand(num_reqs, width, generator=generator, device=device) < 0.9
    table = table.masked_fill(holes, 0).int()
    seq_lens = torch.randint(0, width, (num_reqs,), generator=generator, device=device)
    seq_lens = (seq_lens * block_size).int()
    out_table, out_seq_lens = torch.zeros_like(table), torch.zeros_like(seq_lens)
    arguments = (table, seq_lens, block_size, width * block_size, 1)
    compact_block_table(*arguments, out_table, out_seq_lens)
    expected, lengths = compacted(*arguments)
    assert torch.equal(out_seq_lens, lengths)
    in_use = torch.arange(width, device=device) * block_size < lengths.unsqueeze(1)
    assert torch.equal(out_table[in_use], expected[in_use])
    return 0.0


def _scoring(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, head_size: int
) -> float:
    num_layers, num_heads, num_kv_heads, num_blocks = 4, 32, 8, 300
    queries = torch.randn(num_layers, 16, num_heads, head_size, generator=generator, device=device)
    shape = (num_layers, 400, num_kv_heads, 16, 2 * head_size)
    keys = torch.randn(shape, generator=generator, device=device)[..., :head_size]
    queries, keys = queries.to(dtype), keys.to(dtype)
    rows = torch.randint(0, 16, (num_blocks,), generator=generator, device=device)
    block_ids = torch.randint(0, 400, (num_blocks,), generator=generator, device=device)
    expected = torch.stack(
        [
            mean_key_cosine(layer_queries[rows].float(), layer_keys[block_ids])
            for layer_queries, layer_keys in zip(queries, keys, strict=True)
        ]
    )
    scores = cached_mean_key_cosine(queries, rows, keys, block_ids, 1)
    return 0.0 if scores is None else float((scores - expected).abs().max())
