"""What the examples name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from vllm.v1.metrics import loggers

from vllm_semantic.engine import metrics

MONITORING = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "kv-policy.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_metric_of_the_plugin() -> None:
    shown = " ".join(EXPRESSIONS)
    ours = re.findall(r'"vllm:kv_policy_(\w+)"', Path(metrics.__file__).read_text())
    assert {"recovered_blocks", "score_age_steps"} <= set(ours)
    for name in (*ours, "evicted_blocks", "evicting_requests", "fallbacks"):
        assert f"vllm:kv_policy_{name}" in shown


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_metric_shown_is_there(expression: str) -> None:
    """By its name in the sources of vLLM or of the plugin: a server is not needed for that."""
    known = Path(loggers.__file__).read_text() + Path(metrics.__file__).read_text()
    names = re.findall(r"vllm:(\w+)", expression)
    assert names
    for name in names:
        stem = re.sub(r"_(total|bucket)$", "", name)
        ours = stem.removeprefix("kv_policy_")
        assert f'"vllm:{stem}"' in known or ours in metrics.COUNTERS


def test_what_is_mounted_is_there() -> None:
    compose = yaml.safe_load((MONITORING / "docker-compose.yml").read_text())
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
    ]
    assert len(mounted) == 4
    assert all((MONITORING / path).is_file() for path in mounted)
    for file in MONITORING.rglob("*.yml"):
        assert yaml.safe_load(file.read_text())
    source = yaml.safe_load((MONITORING / "grafana" / "datasource.yml").read_text())
    (uid,) = {of["uid"] for of in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {uid}
