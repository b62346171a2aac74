"""docs/architecture.md names what is there."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+)+)`", PAGE.read_text())))


def test_the_page_walks_through_the_code() -> None:
    """Each of the nine steps, and each row of state, names where it happens."""
    assert len(NAMES) >= 20
    steps = re.split(r"(?m)^\d\. ", PAGE.read_text())[1:]
    assert len(steps) == 9
    assert all("`engine." in step for step in steps)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there(name: str) -> None:
    resolve_name(f"vllm_semantic.{name}")
