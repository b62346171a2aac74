"""The examples run as written; the client runs against a server in ``test_serve``."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ..platforms import default_block_size


@pytest.fixture(autouse=True)
def in_the_repository(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.syspath_prepend(repo)


def test_offline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["examples/offline.py"])
    runpy.run_path("examples/offline.py", run_name="__main__")
    *_, said = capsys.readouterr().out.strip().splitlines()
    numbers = re.fullmatch(
        r"(\d+) tokens filled (\d+) blocks of (\d+): (\d+) were evicted, (\d+) kept", said
    )
    assert numbers, said
    num_tokens, filled, block_size, evicted, kept = map(int, numbers.groups())
    assert block_size == default_block_size()
    assert filled == -(-num_tokens // block_size) == evicted + kept
    assert evicted > 0


def test_recall(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["examples/recall.py"])
    runpy.run_path("examples/recall.py", run_name="__main__")
    *_, without, with_recall, said = capsys.readouterr().out.strip().splitlines()
    assert with_recall == "with recall: 67326"
    assert without.startswith("without recall: ") != without.endswith("67326")
    numbers = re.fullmatch(
        r"(\d+) blocks were evicted, (\d+) kept in host memory, (\d+) came back", said
    )
    assert numbers, said
    evicted, kept, came_back = map(int, numbers.groups())
    assert evicted > kept > came_back > 0


def test_throughput() -> None:
    """vLLM's own benchmark, of a few tokens here."""
    script = ["examples/throughput.sh", "--num-prompts=2", "--random-output-len=40"]
    run = subprocess.run(script, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    plain, first, under_policy, second = run.stdout.strip().splitlines()
    assert (plain, under_policy) == ("vLLM:", "vLLM with --kv-policy semantic:")
    for said in (first, second):
        assert re.match(r"Throughput: [\d.]+ requests/s", said)


def test_a_policy_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("examples.my_policy", run_name="__main__")
    assert len(capsys.readouterr().out.strip()) > 50
