"""A build backend that reads a source package's metadata and builds nothing.

``pip download`` asks a source package for its metadata, and vLLM's own answer takes torch, Rust
and a compiler. The package already holds it as ``PKG-INFO``.
"""

from __future__ import annotations

import email
from pathlib import Path


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: object = None
) -> str:
    """PEP 517's hook; pip calls it in the source's folder."""
    text = Path("PKG-INFO").read_text(encoding="utf-8")
    metadata = email.message_from_string(text)
    dist_info = Path(metadata_directory, f"{metadata['Name']}-{metadata['Version']}.dist-info")
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(text, encoding="utf-8")
    return dist_info.name
