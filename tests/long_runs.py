"""Runs for as long as one likes: their arguments, and what they leave."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """With ``--out`` for :func:`report`; the module's docstring is the help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    return parser


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print it, and write it where that was asked for."""
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if out:
        out.write_text(text)
