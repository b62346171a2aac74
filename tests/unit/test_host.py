"""What `benchmarks overhead` measures is what it says: the plugin's own scheduler and worker."""

from __future__ import annotations

import pytest

from benchmarks import overhead
from benchmarks.host import Host

pytestmark = pytest.mark.cpu_build(
    "the worker's tensors are on a CPU, its scheduler is synchronous"
)

BLOCK_SIZE, LENGTHS = 32, [300, 500, 700]


def run(llama: str, policy: dict[str, object] | None) -> Host:
    host = Host(
        llama,
        policy,
        max_num_seqs=len(LENGTHS),
        max_model_len=1024,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
    )
    host.start([[8] * length for length in LENGTHS])
    host.steps(2 * BLOCK_SIZE)
    return host


@pytest.mark.parametrize("num_groups", [1, 2])
def test_both_sides_decode_and_one_evicts(num_groups: int, llama: str) -> None:
    stock = run(llama, None)
    semantic = run(llama, {"name": "semantic", "layer_groups": num_groups})
    assert stock.evicted_blocks() == 0
    for side in (stock, semantic):
        assert all(of.num_output_tokens > 2 * BLOCK_SIZE for of in side.scheduler.running)
        assert len(side.scheduler.running) == len(LENGTHS)
    managers = semantic.scheduler.kv_policy_managers
    assert len(managers) == num_groups
    ids = list(semantic.worker.rows)
    for group, manager in managers.items():
        rows = semantic.worker._held[group].rows(ids, semantic.worker.seq_lens.numpy())
        assert rows is not None
        for request_id, columns in zip(ids, rows.columns, strict=True):
            table = manager.req_to_blocks[request_id]
            kept = [i for i, block in enumerate(table) if not block.is_null]
            assert columns[: len(kept)].tolist() == kept
        assert manager.stats.evicted_blocks > 0
        # Every step that evicts is asked for its scores first.
        assert manager.stats.fallbacks == 0


def test_overhead_measures_every_side(llama: str) -> None:
    sides = overhead.SIDES | {"two": {"name": "semantic", "layer_groups": 2}}
    cell = overhead.measure(llama, 3, 512, rounds=2, policies=sides)
    assert cell["microseconds"].keys() == sides.keys()
    assert cell["scheduler_ratio"].keys() == sides.keys() - {"stock"}
    assert all(0 < ratio < 100 for ratio in cell["scheduler_ratio"].values())
    # Each request loses a block in each round, and more while prompts are read.
    assert cell["evicted_blocks"] >= 3 * 3
