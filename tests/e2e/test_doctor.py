"""``python -m vllm_semantic doctor``: what it says, what it finds, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_semantic import doctor
from vllm_semantic.upstream import signatures

from ..platforms import on_gpu


def run_doctor(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_semantic", "doctor", *arguments],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_is_well(llama: str) -> None:
    run = run_doctor(llama, "--kv-policy=semantic", "--kv-policy-config.semantic_tokens", "512")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("versions\n")
    assert run.stdout.endswith("All is well.\n")
    lines = {line.strip().partition(" ")[0]: line for line in run.stdout.splitlines()}
    assert "fits" in lines["FLASH_ATTN" if on_gpu() else "CPU_ATTN"]
    assert "sink 8 + recent 128 + semantic 512 = 648 tokens" in lines["policy"]
    scheduler, worker, runner = ("SemanticScheduler", "SemanticCPUWorker", "V1")
    if on_gpu():
        scheduler, worker, runner = ("AsyncSemanticScheduler", "SemanticWorker", "V2")
    assert lines["scheduler"].endswith(f" {scheduler}")
    assert lines["worker"].endswith(f" {worker}")
    assert runner in run.stdout.partition("model runner")[2].splitlines()[0]


def test_what_is_wrong_is_found(llama: str) -> None:
    """For programs; the plugin is left out, and so is not there to refuse anything."""
    run = run_doctor("--json", VLLM_PLUGINS="bitsandbytes")
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert report["ok"] is False
    assert list(report) == ["ok", "versions", "device", "hooks", "backends"]
    wrong = {f["name"] for findings in list(report.values())[1:] for f in findings if not f["ok"]}
    assert wrong == {"VLLM_PLUGINS", "flags", "EngineArgs"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size 2, where each stage"),
        (["--block-size", "256"], "--block-size 256 is too coarse"),
        (
            ["--kv-policy-config.layer_groups", "3"],
            "--kv-policy-config.layer_groups 3 does not divide the 2 full-attention layers of the "
            "model into equal shares; allowed: 1, 2",
        ),
        (["--kv-policy", "smart"], "--kv-policy 'smart' is not known; allowed: full, streaming"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--enable-log-outputs"], "requires --enable-log-requests"),
    ],
)
def test_what_would_be_refused(flags: list[str], reason: str, llama: str) -> None:
    (finding,) = doctor.configuration([llama, "--kv-policy", "semantic", *flags])
    assert not finding.ok
    assert finding.name == "refused"
    assert reason in finding.value


def test_groups_of_layers(llama: str) -> None:
    flags = ["--kv-policy", "semantic", "--kv-policy-config.layer_groups", "2"]
    findings = {finding.name: finding for finding in doctor.configuration([llama, *flags])}
    assert findings["policy"].value.endswith("per request, in each of 2 groups of layers")


def test_without_a_policy(llama: str) -> None:
    findings = {finding.name: finding for finding in doctor.configuration([llama])}
    assert findings["policy"].value == "none without --kv-policy: vLLM as it is"
    assert findings["scheduler"].value == ("AsyncScheduler" if on_gpu() else "Scheduler")
    assert all(finding.ok for finding in findings.values())


def test_another_vllm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    name = "vllm.v1.kv_cache_interface.replace_as"
    monkeypatch.setitem(signatures.CALLED, name, ("spec", "another"))
    gone = "vllm.v1.kv_cache_interface.no_such_function"
    monkeypatch.setitem(signatures.CALLED, gone, ())
    report = doctor.examine([])
    wrong = {f.name: f.value for findings in report.values() for f in findings if not f.ok}
    said = "0.33.0 (the plugin supports 0.32.*; VLLM_SEMANTIC_ALLOW_UNTESTED=1 tries it)"
    assert wrong["vllm"] == said
    assert wrong[name].startswith("takes spec, target_cls")
    assert wrong[gone] == "is gone"
    assert len(wrong) == 3


SLIP = """
from dataclasses import dataclass
from vllm_semantic.policies import SelectivePolicy
@dataclass(frozen=True, kw_only=True)
class Mine(SelectivePolicy):
    name = "mine"
    def score(self, view): return view.keys.norm(dim=-1).mean((2, 3)).tolist()
"""


def test_a_policy_class_that_returns_a_list(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at start, and with no model loaded."""
    (tmp_path / "doctors_policy.py").write_text(SLIP)
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.configuration([llama, "--kv-policy", "doctors_policy.Mine"])
    assert not finding.ok
    said = "--kv-policy 'doctors_policy.Mine' cannot score: TypeError: the scores are a list"
    assert said in finding.value


def test_a_policy_class_that_only_the_doctor_would_find(llama: str, tmp_path: Path) -> None:
    """``python -m`` looks in the folder it runs in; ``vllm serve`` does not."""
    (tmp_path / "policy_here.py").write_text(SLIP.replace(".tolist()", ""))
    run = run_doctor(llama, "--kv-policy", "policy_here.Mine", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "No module named 'policy_here'; its folder has to be in PYTHONPATH" in run.stdout
