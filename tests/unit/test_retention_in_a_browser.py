"""The picture of a request in a real browser: what is drawn is what a person sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_semantic.retention import page, read

from .test_retention import LOG

pytestmark = pytest.mark.skipif(
    find_spec("PyQt6") is None or find_spec("PyQt6.QtWebEngineCore") is None,
    reason="no browser here: pip install PyQt6-WebEngine, which brings Chromium",
)

SCRIPT = """
({
    title: document.title,
    loaded: performance.getEntriesByType("resource").length,
    picture: document.querySelector("svg").getBoundingClientRect().toJSON(),
    cells: [...document.querySelectorAll("svg rect")].map((cell) => {
        const {x, y, width, height} = cell.getBoundingClientRect();
        const top = document.elementFromPoint(x + width / 2, y + height / 2);
        const said = cell.querySelector("title").textContent;
        return {fill: getComputedStyle(cell).fill, width, height, seen: top === cell, said};
    }),
})
"""


def test_every_block_is_seen(repo: Path, tmp_path: Path) -> None:
    evictions, block_size = read(LOG)
    assert block_size is not None
    file = tmp_path / "request.html"
    file.write_text(page(evictions[:1], block_size), encoding="utf-8")
    environment = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.browser", str(file), SCRIPT],
        cwd=repo,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert shown["title"] == "Request a under semantic, KV cache group 0"
    assert shown["loaded"] == 0, "the page asks for nothing else"
    assert shown["picture"]["width"] > 0
    assert len(shown["cells"]) == 6, "192 tokens in blocks of 32"
    assert all(cell["seen"] and cell["width"] > 0 and cell["height"] > 0 for cell in shown["cells"])
    (evicted,) = (cell for cell in shown["cells"] if cell["fill"] == "rgb(214, 39, 40)")
    assert evicted["said"].startswith("block 2, tokens 64 to 95, score 0.25")
    assert len({cell["fill"] for cell in shown["cells"]}) == 4, "kept, by scores, and gone"
