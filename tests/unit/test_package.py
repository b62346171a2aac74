"""What is distributed: a wheel that works where nothing else of the project is, and its sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BUILD = """
import sys
from setuptools import build_meta
out = sys.argv.pop()  # setuptools reads and writes them
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""

USE = """
import importlib.metadata, json
import vllm_semantic
from vllm_semantic import doctor
found = importlib.metadata.distribution("vllm-semantic")
(entry,) = found.entry_points.select(group=doctor.PLUGINS_GROUP)
assert entry.load() is vllm_semantic.register
print(json.dumps([vllm_semantic.__file__, found.version, vllm_semantic.__version__]))
"""


def build(sources: Path, out: Path) -> tuple[Path, Path]:
    """An sdist and a wheel of some sources, by the build backend itself; no network."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(out)]
    run = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    sdist, wheel = sorted(out.glob("*.tar.gz")), sorted(out.glob("*.whl"))
    assert len(sdist) == len(wheel) == 1
    return sdist[0], wheel[0]


@pytest.fixture(scope="module")
def built(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """From a copy of what git knows, so that nothing is built beside the sources."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repo,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (repo / name).is_file():
            target = sources / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repo / name).read_bytes())
    return build(sources, out)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path], repo: Path) -> None:
    package = (repo / "vllm_semantic").rglob("*")
    files = {str(f.relative_to(repo)) for f in package if f.suffix == ".py" or f.name == "py.typed"}
    assert names(built[1]) == files


def test_the_sources_build_the_same(built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (sources,) = (tmp_path / "sdist").iterdir()
    for beside in ("CHANGELOG.md", "docs/design.md", "examples/serve.sh", "tests/oracle.py"):
        assert (sources / beside).is_file()
    (tmp_path / "again").mkdir()
    assert names(build(sources, tmp_path / "again")[1]) == names(wheel)


def test_the_wheel_is_used_as_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Not the sources that this environment has installed in place."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    install += ["--no-deps", "--no-index", "--target", str(site), str(built[1])]
    subprocess.run(install, check=True, capture_output=True)
    run = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    file, *versions = json.loads(run.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert versions == [built[1].name.split("-")[1]] * 2
