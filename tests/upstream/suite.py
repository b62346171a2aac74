"""One run of vLLM's tests, and what came of each."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
SUITE = "tests/v1/core"

SETTINGS = """\
[pytest]
junit_family = xunit1
markers =
    asyncio
    cpu_test
    optional
    skip_global_cleanup
    slow_test
"""


@dataclass(frozen=True)
class Way:
    """How the suite runs: which of our pytest plugins, and whether vLLM loads the plugin."""

    name: str
    what: str
    pytest_plugins: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)
    """What the run has to say of itself."""


WAYS = {
    way.name: way
    for way in (
        Way(
            "stock",
            "vLLM without any plugin",
            ("upstream_common",),
            {"VLLM_PLUGINS": ""},
            {"plugin_installed": "False", "engine_imported": "False"},
        ),
        Way(
            "installed",
            "with the plugin installed and no policy",
            ("upstream_common",),
            properties={"plugin_installed": "True", "engine_imported": "False"},
        ),
        Way(
            "semantic",
            "with SemanticSpec groups at an ample budget",
            ("upstream_common", "upstream_ample"),
            properties={"plugin_installed": "True", "engine_imported": "True"},
        ),
    )
}


@dataclass
class Outcome:
    """One test: ``passed``, ``failed`` or ``skipped``, and the first line of why."""

    result: str
    message: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    """What it built, where that is counted."""


@dataclass
class Run:
    """One way's run of the suite, by test id."""

    outcomes: dict[str, Outcome]
    counts: dict[str, int]
    second_tries: list[str] = field(default_factory=list)
    """Tests that failed among all the others and passed when run again."""


def run(way: Way, folder: Path, select: list[str]) -> Run:
    """Run the suite in ``folder``; run again what failed, since a loaded machine times out."""
    (folder / "pytest.ini").write_text(SETTINGS)
    whole = _pytest(way, folder, select or [SUITE], f"{way.name}.xml")
    failed = [name for name, outcome in whole.outcomes.items() if outcome.result == "failed"]
    if failed:
        again = _pytest(way, folder, failed, f"{way.name}-again.xml")
        for name, outcome in again.outcomes.items():
            if outcome.result == "passed":
                whole.outcomes[name] = outcome
                whole.second_tries.append(name)
    return whole


def _pytest(way: Way, folder: Path, select: list[str], report: str) -> Run:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--show-capture=no", f"--junitxml={report}"]
    for plugin in way.pytest_plugins:
        command += ["-p", plugin]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_", "PYTEST_"))
    }
    environment |= {
        # The working folder comes first: ``tests`` is vLLM's there.
        "PYTHONPATH": os.pathsep.join([str(HERE / "plugins"), str(HERE.parent.parent)]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **way.environment,
    }
    log = folder / f"{report}.log"
    with log.open("w") as output:
        code = subprocess.run(
            [*command, *select], cwd=folder, env=environment, stdout=output, stderr=output
        ).returncode
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}:\n{log.read_text()[-3000:]}")
    found = read_report(folder / report, folder)
    wrong = {
        name: found.properties.get(name)
        for name, value in way.properties.items()
        if found.properties.get(name) != value
    }
    if wrong:
        raise RuntimeError(f"{way.name}: not run as meant: {wrong}, wanted {way.properties}")
    return Run(found.outcomes, {k: int(v) for k, v in found.properties.items() if v.isdigit()})


@dataclass
class Report:
    """A JUnit file."""

    outcomes: dict[str, Outcome]
    properties: dict[str, str]


def read_report(path: Path, folder: Path) -> Report:
    """Read pytest's JUnit file; ``folder`` is where pytest ran."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    outcomes = {}
    for case in suite.iter("testcase"):
        problem = next((e for e in case if e.tag in ("failure", "error", "skipped")), None)
        name = f"{_module(case, folder)}::{case.get('name')}"
        if problem is None:
            outcomes[name] = Outcome("passed", counts=_counts(case))
        else:
            result = "skipped" if problem.tag == "skipped" else "failed"
            outcomes[name] = Outcome(result, " ".join((problem.get("message") or "").split()))
    properties = {p.get("name", ""): p.get("value", "") for p in suite.iterfind("properties/*")}
    return Report(outcomes, properties)


def _module(case: ElementTree.Element, folder: Path) -> str:
    """The path of a test's module, and its class, from JUnit's dotted name."""
    parts = case.get("classname", "").split(".")
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length]).with_suffix(".py")
        if (folder / path).is_file():
            return "::".join([path.as_posix(), *parts[length:]])
    raise ValueError(f"{case.get('classname')} is no module below the working folder")


def _counts(case: ElementTree.Element) -> dict[str, int]:
    properties = case.iterfind("properties/*")
    return {p.get("name", ""): int(p.get("value", "0")) for p in properties}
