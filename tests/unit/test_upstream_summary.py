"""What ``python -m tests.upstream`` makes of three runs of vLLM's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.upstream import __main__ as upstream
from tests.upstream.suite import Outcome, Run, read_report

JUNIT = """<testsuites><testsuite>
<properties><property name="semantic_managers" value="3" /></properties>
<testcase classname="tests.core.test_a" name="test_one[x/y]">
<properties><property name="semantic_managers" value="3" /></properties></testcase>
<testcase classname="tests.core.test_a.TestB" name="test_two"><failure message="no&#10; luck" />
</testcase>
</testsuite></testsuites>"""


def test_a_report_is_read_by_test_id(tmp_path: Path) -> None:
    (tmp_path / "tests/core").mkdir(parents=True)
    (tmp_path / "tests/core/test_a.py").touch()
    (tmp_path / "report.xml").write_text(JUNIT)
    report = read_report(tmp_path / "report.xml", tmp_path)
    assert report.properties == {"semantic_managers": "3"}
    assert report.outcomes == {
        "tests/core/test_a.py::test_one[x/y]": Outcome("passed", counts={"semantic_managers": 3}),
        "tests/core/test_a.py::TestB::test_two": Outcome("failed", "no luck"),
    }


def test_what_differs_from_stock_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        upstream, "DEVIATIONS", {"semantic": {"known": "because", "mended": "no longer"}}
    )
    stock = dict.fromkeys(["known", "mended", "fine", "lost", "broken"], Outcome("passed"))
    ours = dict.fromkeys(["mended", "fine"], Outcome("passed"))
    ours |= dict.fromkeys(["known", "broken"], Outcome("failed", "why"))
    result = upstream.summarise({"stock": Run(stock, {}), "semantic": Run(ours, {})})
    found = {d["test"]: (d["stock"], d["now"], d["reason"]) for d in result["deviations"]}
    assert found == {
        "broken": ("passed", "failed", ""),
        "known": ("passed", "failed", "because"),
        "lost": ("passed", "missing", ""),
    }
    assert result["stale_reasons"] == ["semantic: mended"]
