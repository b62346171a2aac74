"""Model Runner V2, scheduling ahead, our Triton kernels: what a GPU does by default.

The tests of Runner V1 run again in a process in which Triton's interpreter is the device
(``tests/interpreter.py``). To run one by hand: ``KV_POLICY_TEST_RUNNER=V2 pytest TEST``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .. import interpreter

pytestmark = pytest.mark.cpu_build("on a GPU every suite runs on Model Runner V2")

SUITES = {
    "kernels": [
        "tests/interpreted/test_scoring.py",
        "tests/interpreted/test_queries.py",
        "tests/unit/test_held_blocks.py",
        "tests/unit/test_scorer.py",
        "tests/unit/test_reserved_memory.py",
    ],
    "backend": [
        "tests/interpreted/test_triton_attn.py",
        "tests/interpreted/test_token_scales.py",
        "tests/interpreted/test_forcing.py",
        "tests/interpreted/test_measurements.py",
    ],
    "oracle": [
        "tests/e2e/test_oracle.py::test_engine_agrees_with_oracle[llama-32]",
        "tests/e2e/test_oracle.py::test_engine_agrees_with_oracle[gemma-32]",
        "tests/e2e/test_oracle.py::test_groups_of_layers_agree_with_oracle[llama-32]",
        "tests/e2e/test_oracle.py::test_recall_agrees_with_oracle[llama-32]",
        "tests/e2e/test_oracle.py::test_rules_of_the_field_agree_with_oracle"
        "[semantic, by attention]",
    ],
    "speculation": [
        "tests/e2e/test_speculation.py::test_drafts_change_nothing",
        "tests/e2e/test_speculation.py::test_a_model_that_drafts_sees_what_is_held",
        "tests/e2e/test_speculation.py::test_mtp",
        "tests/e2e/test_speculation.py::test_a_step_at_a_time",
    ],
    "state": [
        "tests/e2e/test_identity.py::test_policy_runs_where_it_says",
        "tests/e2e/test_identity.py::test_ample_budget_changes_nothing[prefix-caching-semantic]",
        "tests/e2e/test_invariance.py::test_after_preemption",
        "tests/e2e/test_invariance.py::test_abort_in_prefill_and_decode",
        "tests/e2e/test_oracle.py::test_hybrid_models_agree_with_oracle[granite_hybrid]",
    ],
}


@pytest.mark.parametrize("suite", SUITES)
def test_runner_v2(suite: str, repo: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *SUITES[suite]],
        cwd=repo,
        env=os.environ | {interpreter.SWITCH: "V2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    summary = run.stdout.strip().rpartition("\n")[2]
    passed = re.match(r"(\d+) passed(, \d+ warnings?)? in", summary)
    assert passed, f"something was skipped: {summary}"
    assert int(passed[1]) >= len(SUITES[suite])
