"""What is imported and changed, and when: nothing of vLLM's without a policy."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_semantic.upstream.hooks import WORKERS

from ..platforms import stock_block_size

PURE_PACKAGES = [
    "vllm_semantic",
    "vllm_semantic.config",
    "vllm_semantic.layer_groups",
    "vllm_semantic.messages",
    "vllm_semantic.recall",
    "vllm_semantic.served",
    "vllm_semantic.frontend",
    "vllm_semantic.policies",
    "vllm_semantic.ops",
]

BLOCK_VLLM = """
import sys

class NoVllm:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm" or name.startswith("vllm."):
            raise ModuleNotFoundError(f"{name} is not to be imported here")

sys.meta_path.insert(0, NoVllm())
"""


def test_engines_take_as_many_threads_as_they_are_given() -> None:
    """Files of tests run beside each other: two engines of all cores each wait for one another."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def run_python(code: str, repo: Path) -> str:
    """Run code in a process of its own; its last line is the answer."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().rpartition("\n")[2]


def pure_modules(repo: Path) -> list[str]:
    """Every module of the pure packages, also one that is added later."""
    modules = list(PURE_PACKAGES)
    for package in ("policies", "ops", "ops.kernels"):
        files = sorted((repo / "vllm_semantic" / package.replace(".", "/")).glob("*.py"))
        modules += [f"vllm_semantic.{package}.{f.stem}" for f in files if f.stem != "__init__"]
    return modules


@pytest.mark.parametrize("without", ["", BLOCK_VLLM], ids=["vllm-present", "vllm-unimportable"])
def test_pure_packages_do_not_import_vllm(without: str, repo: Path) -> None:
    modules = pure_modules(repo)
    assert len(modules) >= len(PURE_PACKAGES) + 7
    code = f"""{without}
import importlib, json, sys
imported = {{}}
for name in {modules!r}:
    importlib.import_module(name)
    imported[name] = "vllm" in sys.modules
print(json.dumps(imported))
"""
    assert json.loads(run_python(code, repo)) == dict.fromkeys(modules, False)


def imports(file: Path, package: Path) -> set[str]:
    """The modules of a package that a file imports, at its top or in a function."""
    found = set()
    here = file.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*here[: -node.level], *(node.module or "").split(".")]
        names = [".".join([*filter(None, base), alias.name]) for alias in node.names]
        found |= {*names, ".".join(filter(None, base))}
    return found


def test_no_two_modules_need_each_other(repo: Path) -> None:
    """Imports inside functions and for type checkers count: each module can be read by itself."""
    package = repo / "vllm_semantic"
    files = {
        ".".join(f.relative_to(repo).with_suffix("").parts): f
        for f in package.rglob("*.py")
        if f.stem != "__init__"
    }
    graph = {name: imports(file, package) & files.keys() for name, file in files.items()}
    assert "vllm_semantic.engine.manager" in graph["vllm_semantic.engine.spec"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_pure_packages_work_without_vllm(repo: Path) -> None:
    code = f"""{BLOCK_VLLM}
from vllm_semantic.served import ServedPolicies
from vllm_semantic.messages import KVPolicyStep
from vllm_semantic.policies import BlockView
import torch
policy = ServedPolicies.from_config({{"name": "semantic", "semantic_tokens": 96}}).default
keys = torch.ones(1, 2, 2, 16, 8)
view = BlockView(torch.ones(1, 1, 4, 8), keys, keys.clone, torch.arange(2), 32, 1.0)
scores = policy.score(view)
print(policy.budget(32).total, scores.shape[1], KVPolicyStep().evictions)
"""
    assert run_python(code, repo) == "8 2 {}"


def test_importing_the_plugin_is_cheap(repo: Path) -> None:
    """vLLM does it in every process, also in those that want no policy."""
    code = """
import sys, vllm_semantic
assert vllm_semantic.register
print([name for name in ("torch", "vllm") if name in sys.modules])
"""
    assert run_python(code, repo) == "[]"


REGISTRIES = """
import json
from vllm.engine.arg_utils import EngineArgs
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.attention.backends import registry

def state():
    kv_cache_spec_registry.KVCacheSpecRegistry._ensure_registered()
    return {
        "overrides": [str(member) for member in registry._ATTN_OVERRIDES],
        "specs": [c.__name__ for c in kv_cache_spec_registry._REGISTRY_KVCACHESPEC_LIST],
        "modules": [name for name in sys.modules if name.startswith("vllm_semantic.engine")],
    }

def depth(function):
    return 1 + depth(function.__wrapped__) if hasattr(function, "__wrapped__") else 0

def depths():
    return {
        "add_cli_args": depth(EngineArgs.add_cli_args),
        "create_engine_config": depth(EngineArgs.create_engine_config),
    }
"""


def test_registering_twice_without_a_policy(repo: Path) -> None:
    code = f"""
import sys
{REGISTRIES}
before = state(), depths()
import vllm_semantic
vllm_semantic.register()
once = state(), depths()
vllm_semantic.register()
print(json.dumps([before, once, (state(), depths())]))
"""
    before, once, twice = json.loads(run_python(code, repo))
    assert before[0]["overrides"] == []
    assert "FullAttentionSpec" in before[0]["specs"]
    assert once[0] == before[0]
    assert once[1] == {name: depth + 1 for name, depth in before[1].items()}
    assert twice == once


def test_registering_again_after_another_plugin(repo: Path) -> None:
    code = f"""
{REGISTRIES}
import vllm_semantic
vllm_semantic.register()
ours, before = EngineArgs.create_engine_config, depths()
EngineArgs.create_engine_config = lambda self: ours(self)  # as vllm-bnb-plugin does
theirs = EngineArgs.create_engine_config
vllm_semantic.register()
print(json.dumps([EngineArgs.create_engine_config is theirs, before, depths()]))
"""
    untouched, before, after = json.loads(run_python(code, repo))
    assert untouched
    assert after == before | {"create_engine_config": 0}


CONFIG = """
import json, sys
import vllm_semantic
from vllm.engine.arg_utils import EngineArgs

registered, model = json.loads(sys.argv[1])
if registered:
    vllm_semantic.register()
args = EngineArgs(model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=512)
config = args.create_engine_config()
from vllm.v1.metrics.loggers import StatLoggerManager
print(json.dumps({
    "stat_loggers": hasattr(StatLoggerManager, "kv_policy_hook"),
    "scheduler_cls": config.scheduler_config.scheduler_cls,
    "worker_cls": config.parallel_config.worker_cls,
    "block_size": config.cache_config.block_size,
    "additional_config": config.additional_config,
    "hash": config.compute_hash(),
    "imported": [name for name in sys.modules if name.startswith("vllm_semantic.engine")],
    "scheduler": config.scheduler_config.get_scheduler_cls().__module__,
}))
"""


def config_of(repo: Path, llama: str, plugins: str, registered: bool) -> dict[str, Any]:
    import os

    run = subprocess.run(
        [sys.executable, "-c", CONFIG, json.dumps([registered, llama])],
        cwd=repo,
        env=os.environ | {"VLLM_PLUGINS": plugins},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    config: dict[str, Any] = json.loads(run.stdout.strip().rpartition("\n")[2])
    return config


def test_without_a_policy_the_config_is_vllms_own(repo: Path, llama: str) -> None:
    """The plugin not loaded at all, and loaded as well as registered by hand: no difference."""
    stock = config_of(repo, llama, plugins="", registered=False)
    ours = config_of(repo, llama, plugins="semantic_kv", registered=True)
    assert ours == stock
    assert stock["stat_loggers"] is False
    assert stock["scheduler_cls"] is None
    assert stock["worker_cls"] in WORKERS
    assert stock["block_size"] == stock_block_size()
    assert stock["additional_config"] == {}
    assert stock["imported"] == []
    assert stock["scheduler"].startswith("vllm.v1.core.sched.")
