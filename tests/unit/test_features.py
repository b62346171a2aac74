"""The list of features in docs/: every test it names exists, and it is the list there is."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from benchmarks.readme import FEATURES_PAGE, features, replaced

TESTS = Path(__file__).resolve().parent.parent
FEATURES: dict[str, dict[str, list[str]]] = tomllib.loads((TESTS / "features.toml").read_text())


def missing(test: str) -> bool:
    """Whether a file, its function or the id of a case is not there."""
    file, _, rest = test.partition("::")
    function, _, case = rest.rstrip("]").partition("[")
    if not (TESTS / file).is_file():
        return True
    nodes = list(ast.walk(ast.parse((TESTS / file).read_text())))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    words = {node.value for node in nodes if isinstance(node, ast.Constant)}
    return bool(function and function not in functions) or bool(case and case not in words)


def test_every_test_named_exists() -> None:
    assert missing("unit/test_features.py::test_that_is_not_there")
    assert missing("e2e/test_refused.py::test_refused_at_start[no such feature]")
    assert list(FEATURES) == ["works", "refused", "not yet run"]
    assert not [
        test
        for of_state in FEATURES.values()
        for tests in of_state.values()
        for test in tests
        if missing(test)
    ]


def test_what_works_or_is_refused_has_a_test() -> None:
    listed = FEATURES["works"] | FEATURES["refused"]
    assert not [feature for feature, tests in listed.items() if not tests]


def test_every_refusal_is_listed() -> None:
    (table,) = re.findall(
        r"^REFUSED.*?^}", (TESTS / "e2e" / "test_refused.py").read_text(), re.MULTILINE | re.DOTALL
    )
    named = {test for tests in FEATURES["refused"].values() for test in tests}
    cases = re.findall(r'^    "([^"]+)": \(', table, re.MULTILINE)
    prefix = "e2e/test_refused.py::test_refused_at_start"
    assert cases
    assert not [case for case in cases if f"{prefix}[{case}]" not in named]


def test_the_page_is_up_to_date() -> None:
    page = (TESTS.parent / FEATURES_PAGE).read_text()
    assert replaced(page, "features", features()) == page, "run: python -m benchmarks readme"
