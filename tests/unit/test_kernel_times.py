"""What a policy adds to a step, told from two profiles; and a profile of a known step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_times import (
    ATTENTION,
    SHAPED,
    Times,
    added,
    attention_seconds,
    kernel_times,
    total_seconds,
)
from vllm_semantic.ops.kernels import scoring


def test_what_runs_more_often_is_added() -> None:
    stock = {
        "flash::FlashAttnFwd<64>": Times(3e-3, 32),
        "nvjet_sm90_tst_256x128": Times(4e-3, 33),
        "vectorized_gather_kernel": Times(2e-6, 1),
        "rms_norm": Times(1e-4, 32),
    }
    policy = {
        "flash::FlashAttnFwd<128>": Times(3e-3, 32),  # other lengths, another kernel
        "nvjet_sm90_tst_128x128": Times(4e-3, 33),
        "vectorized_gather_kernel": Times(66e-6, 33),
        "rms_norm": Times(2e-4, 32),  # slower by chance
        "index_copy_kernel": Times(220e-6, 32),
    }
    more = added(policy, stock)
    assert list(more) == ["index_copy_kernel", "vectorized_gather_kernel"]
    assert more["index_copy_kernel"] == Times(220e-6, 32)
    assert more["vectorized_gather_kernel"] == pytest.approx(Times(64e-6, 32))
    assert added(stock, stock) == {}
    assert attention_seconds(policy) == 3e-3
    assert total_seconds(stock) == pytest.approx(7.102e-3)


def test_our_kernels_are_not_taken_for_others() -> None:
    names = [name for name in vars(scoring) if name.endswith("_kernel")]
    assert len(names) >= 2
    assert not [name for name in names if ATTENTION.search(name) or SHAPED.search(name)]


def test_a_known_step() -> None:
    """Two steps of one product and three sums."""
    a = torch.ones(256, 256)

    def run() -> None:
        for _ in range(2):
            torch.mm(a, a)
            for _ in range(3):
                a.sum()

    kernels = kernel_times(torch.device("cpu"), run, num_steps=2)
    assert kernels["aten::mm"].calls == 1
    assert kernels["aten::sum"].calls == 3
    assert 0 < kernels["aten::sum"].seconds < total_seconds(kernels) < 1
