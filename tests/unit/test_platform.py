"""On how many threads a scoring runs, and that the process has all of its own again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_semantic.ops.platform import SERIAL_NUMEL, threads_for


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch._C.set_num_threads(3)
    # What vLLM's CPU worker leaves of it.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    yield
    torch._C.set_num_threads(before)


@pytest.mark.parametrize(("numel", "threads"), [(SERIAL_NUMEL - 1, 1), (SERIAL_NUMEL, 3)])
def test_few_elements_are_for_one_thread(numel: int, threads: int) -> None:
    with threads_for(numel):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3


def test_a_failure_gives_the_threads_back() -> None:
    with pytest.raises(ValueError, match="no score"), threads_for(1):
        raise ValueError("no score")
    assert torch.get_num_threads() == 3
