"""``python -m benchmarks gpu --quick`` on whatever vLLM runs on here: it runs, and is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checks, gpu
from benchmarks.context import on_gpu

BROKEN = "broken"
"""A task among the others that leaves its requests behind and fails."""

CHECKS = [checks.names(on_gpu())[0], "oracle"]


def broken(sides: gpu.Sides, sizes: gpu.Sizes) -> Any:
    for side in sides.values():
        side.start_decoding(gpu.random_tokens(2, 400), 5)
    sides["policy"].decode(100)  # more than its requests may


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a run, in which another had left something."""
    path = tmp_path_factory.mktemp("gpu") / "figures.json"
    path.write_text(json.dumps({"details": {"another-model": {"bf16": {}}}}))
    tasks = {BROKEN: (broken, 0.0), **gpu.TASKS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "TASKS", tasks)
        gpu.run(["tiny"], out=path, quick=True, seconds=1200, only=[*CHECKS, *tasks])
    yield path


@pytest.fixture
def report(out: Path) -> Any:
    return json.loads(out.read_text())


@pytest.fixture
def found(report: Any) -> Any:
    return report["details"]["tiny"]["bf16"]["semantic"]


def test_correctness_comes_with_it(report: Any) -> None:
    assert report["correctness"].keys() == set(CHECKS)
    by_oracle = report["correctness"]["oracle"]
    assert all(of["passed"] for of in report["correctness"].values()), report["correctness"]
    assert 0 < by_oracle["largest_difference"] < by_oracle["allowed_difference"]
    assert by_oracle["evicted_blocks"] > 0


def test_every_task_has_its_figures(found: Any, report: Any) -> None:
    assert found["tasks"].keys() == gpu.TASKS.keys()
    assert not found.get("skipped")
    for name, value in found["figures"].items():
        assert value > 0 or name == "idle_kernel_share"
        assert report[f"{name}_bf16"] == value
    assert found["figures"].keys() >= {
        "no_eviction_throughput_ratio",
        "idle_step_ratio",
        "over_budget_step_ratio",
        "over_budget_kernel_share",
        "attention_over_roofline",
        "ttft_ratio_1k",
        "decode_flatness_1k_over_512",
        "kv_bound_throughput_ratio_1k",
        "serving_4x512_32_ratio",
    }
    assert "another-model" in report["details"], "what others left stays"


def test_a_task_that_fails_says_why_and_ends_no_other(found: Any) -> None:
    assert found["failed"].keys() == {BROKEN}
    assert "tokens were decoded, not" in found["failed"][BROKEN]


def test_kept_kv_is_what_the_budget_says(found: Any) -> None:
    """In bytes: 9 blocks of 32 tokens or 17 of 16, and at most two more."""
    over_budget = found["tasks"]["over_budget"]
    kept = over_budget["kept"]["policy"]
    per_token = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, channels, bytes
    assert kept["kv_bytes"] == kept["tokens"] * kept["requests"] * per_token
    budget, block_size = (272, 16) if on_gpu() else (288, 32)
    assert budget <= kept["tokens"] <= budget + 2 * block_size
    read = over_budget["read_kv_bytes"] / per_token / kept["requests"]
    assert budget <= read <= budget + 2 * block_size
    alone = found["tasks"]["latency"]
    for length in gpu.QUICK.contexts:
        assert alone["policy"][str(length)]["tokens"] <= budget + 2 * block_size
        assert alone["stock"][str(length)]["tokens"] >= length


def test_kernels_are_the_plugins(found: Any) -> None:
    """Nothing of a policy's runs where nothing is evicted soon; over budget it scores."""
    idle, over_budget = (found["tasks"][name] for name in ("idle", "over_budget"))
    assert over_budget["added_kernels"]
    shares = [of["share"] for of in over_budget["added_kernels"].values()]
    assert sum(shares) == pytest.approx(found["figures"]["over_budget_kernel_share"])
    assert 0 < over_budget["attention_seconds"]["policy"] < over_budget["kernel_seconds"]["policy"]
    assert found["figures"]["idle_kernel_share"] < sum(shares)
    assert idle["kernel_seconds"].keys() == {"stock", "policy"}


def test_what_ran_it_is_told(found: Any, report: Any) -> None:
    for chosen in found["engines"].values():
        assert chosen.keys() == {"runner", "scheduling", "backend", "cuda_graphs", "dtype"}
    machine = report["context"]["machine"]
    assert machine["device"]
    assert ("driver" in machine) == on_gpu()


def test_without_time_a_task_is_skipped_and_named() -> None:
    report = gpu.Report(None, seconds=10)
    gpu._run_task("serving", {}, gpu.Sizes(), ("details", "a"), report)
    (skipped,) = report.content["details"]["a"].values()
    assert skipped == {"serving": "10 s were left, it may take 50 s"}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--only decode is not known; allowed: .*oracle, idle"):
        gpu.run(only=["decode"], out=None)


def test_a_check_that_fails_ends_no_other() -> None:
    def fail() -> Any:
        raise RuntimeError("no such device")

    prepared = {"oracle": fail, "NF4": lambda: {"weight_bytes": 1}}
    found = dict(checks.run(prepared, on_gpu=False))
    assert found == {
        "oracle": {"passed": False, "error": "RuntimeError: no such device"},
        "NF4": {"passed": True, "weight_bytes": 1},
    }
