"""A policy class of one's own: every slip of its author has a message that names it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_semantic import served
from vllm_semantic.config import describe
from vllm_semantic.engine.request_blocks import RequestBlocks
from vllm_semantic.policies import KVPolicy
from vllm_semantic.policies.check import RESERVED
from vllm_semantic.policies.tova import TOVAPolicy
from vllm_semantic.policies.trial import AttentionShape, checked_ranks, checked_scores
from vllm_semantic.served import ServedPolicies

HEADER = """
import abc, dataclasses, enum, sys, torch
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Optional
from vllm_semantic.policies import BlockBudget, KVPolicy, SelectivePolicy, SemanticPolicy
from vllm_semantic.policies.random import RandomPolicy
from vllm_semantic.policies.tova import TOVAPolicy
own = dataclass(frozen=True, kw_only=True)
class Mode(enum.Enum):
    FAST = "fast"
    SLOW = 2
"""
SCORE = "def score(self, view): return view.full.keys.norm(dim=-1).mean((2, 3))"
MINE = f"@own\nclass Mine(SelectivePolicy):\n    name: ClassVar[str] = 'mine'\n    {SCORE}\n"

Write = Callable[..., str]
numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A module of that source; the name of its class ``Mine``."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str, header: str = HEADER) -> str:
        module = f"own_policy_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(header + source)
        return f"{module}.Mine"

    return write


def mine(*lines: str, base: str = "SelectivePolicy", score: str = SCORE) -> str:
    """A class that is right but for these lines."""
    body = ["name: ClassVar[str] = 'mine'", score, *lines]
    return f"@own\nclass Mine({base}):\n" + "".join(f"    {line}\n" for line in body if line)


def serve(name: str, **options: Any) -> ServedPolicies:
    """What happens before a model is loaded."""
    own = ServedPolicies.from_config({"name": name, **options})
    own.try_out(AttentionShape(num_heads=4, num_kv_heads=2, head_size=8, block_size=16))
    return own


def refused(name: str, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        serve(name, **options)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


SLIPS: dict[str, tuple[str, str]] = {
    # -- import
    "syntax": ("class Mine(:", "cannot be imported: SyntaxError"),
    "missing import": ("import no_such_thing", "cannot be imported: ModuleNotFoundError: No mod"),
    "exits": ("sys.exit('bye')", r"cannot be imported: SystemExit: bye \(line 12 of"),
    "raises": ("1 / 0", "cannot be imported: ZeroDivisionError"),
    "not there": ("", "cannot be imported: AttributeError: .* no attribute 'Mine'"),
    "no class": ("def Mine(): pass", "is not a subclass of KVPolicy"),
    "another class": ("class Mine: pass", "is not a subclass of KVPolicy"),
    "an instance": (MINE + "Mine = Mine()", "is not a subclass of KVPolicy"),
    "abstract": (mine("@abc.abstractmethod\n    def f(self): ..."), "is abstract: f is missing"),
    # -- decorator and fields
    "not frozen": (MINE.replace("@own", "@dataclass"), "TypeError: cannot inherit non-frozen"),
    "no decorator": (
        mine("weight: float = 1.0").replace("@own\n", ""),
        r"Mine has no @dataclass\(frozen=True, kw_only=True\), so weight would be ignored",
    ),
    "base without decorator": (
        "class Base(SelectivePolicy):\n    weight: float = 1.0\n" + mine(base="Base"),
        r"Base has no @dataclass.* weight would be ignored",
    ),
    "eq": (
        mine("weight: float = 1.0").replace("@own", "@dataclass(frozen=True, eq=False)"),
        "Mine has eq=False",
    ),
    "own eq": (mine("def __eq__(self, other): return True"), "Mine must not override __eq__"),
    "own hash": (mine("def __hash__(self): return 1"), "Mine must not override __hash__"),
    "mutable default": (mine("weights: list = []"), "mutable default"),
    "list": (mine("weights: list[int] = field(default_factory=list)"), "list.* is none of bool"),
    "no default": (mine("weight: float"), "has an option weight without a default"),
    "init": (mine("weight: float = field(default=1.0, init=False)"), "weight with init=False"),
    "compare": (mine("weight: float = field(default=1.0, compare=False)"), "or compare=False"),
    "post init": (
        mine("def __post_init__(self): raise ValueError('never')"),
        r"cannot be made: ValueError: never \(line 16 of own_policy",
    ),
    "post init changes": (
        mine("def __post_init__(self): object.__setattr__(self, 'sink_tokens', -1)"),
        "has sink_tokens = -1; allowed: integers from 0",
    ),
    "unset type": (mine("sink_tokens = 16"), "Mine sets sink_tokens = 16, which would be ignored"),
    "no part": (mine("kept_tokens = 16"), "Mine sets kept_tokens = 16, which would be ignored"),
    "property": (mine("recent_tokens = property(lambda self: 64)"), "recent_tokens = <property"),
    "unknown type": (mine("weight: 'Unknown' = 1"), "NameError: name 'Unknown'"),
    "odd type": (mine("weight: object = 1"), "object.* is none of bool, int, float"),
    "wrong default": (mine("weight: float = None"), "default weight = None; allowed: numbers"),
    "NaN": (mine("weight: float = float('nan')"), "default weight = nan; allowed: numbers"),
    "half a token": (mine("kept_tokens: float = 8"), "TypeError: a part of the budget is annot"),
    # -- class variables
    "no name": (MINE.replace("name: ClassVar[str] = 'mine'", ""), "has the name None; allowed: te"),
    "name is an option": (MINE.replace("ClassVar[str]", "str"), "has an option name, which means"),
    "name is a number": (MINE.replace("'mine'", "7"), "has the name 7; allowed: text"),
    "name of another": (MINE.replace("'mine'", "'semantic'"), "name 'semantic' of another policy"),
    "inherited name": (
        f"@own\nclass Mine(TOVAPolicy):\n    {SCORE}",
        "name 'tova' of another policy",
    ),
    "bounded": (mine("bounded = 'no'"), "has bounded = 'no'; allowed: True, False"),
    "choices": (
        mine("kind: str = 'a'", "choices = {'kind': 'ab'}"),
        "has choices = .*; allowed: a tuple",
    ),
    "choices of nothing": (mine("choices = {'kind': ('a',)}"), "has choices = "),
    "default is no choice": (
        mine("kind: str = 'c'", "choices = {'kind': ('a', 'b')}"),
        "default kind = 'c'; allowed: a, b",
    ),
    "no queries": (mine("num_queries = 0"), "num_queries = 0; allowed: integers from 1 to 1024"),
    "all queries": (mine("num_queries = 10**9"), "num_queries = 1000000000; allowed"),
    "half a query": (mine("num_queries = 8.0"), "num_queries = 8.0; allowed"),
    "queries raise": (
        mine("@property\n    def num_queries(self): return self.window"),
        "cannot be used: AttributeError: .*'window'",
    ),
    "decay": (mine("decay = 1.5"), "has decay = 1.5; allowed: numbers from 0 to 1"),
    "decay is NaN": (mine("decay = float('nan')"), "has decay = nan"),
    # -- budget
    "score is never called": (
        mine("recent_tokens: int = 64", base="KVPolicy"),
        "overrides score, which would never be called: no option beside",
    ),
    "never evicts": (mine("bounded = False"), "never be called: bounded is False"),
    "no score": (mine(score=""), "keeps selected_tokens by score and overrides neither"),
    "both": (mine("def rank(self, *args): return []"), "Mine overrides both score and rank"),
    "another sum": (
        mine(
            "recent_tokens: int = 64",
            "kept_tokens: int = 64",
            "selected_tokens = property(lambda self: 32)",
            base="KVPolicy",
        ),
        "has selected_tokens = 32, and options .* of 64; allowed: the same",
    ),
    "budget": (mine("def budget(self, size): return None"), "must not override budget"),
    "parts": (mine("def parts(self): return {}"), "must not override parts"),
    "budget_tokens": (mine("budget_tokens = 4"), "must not override budget_tokens"),
    # -- processes
    "repr": (mine("def __repr__(self): return 1 / 0"), "cannot be used: ZeroDivisionError"),
    "local class": (
        "def make():\n"
        + "".join(f"    {line}\n" for line in MINE.splitlines())
        + "    return Mine\nMine = make()",
        "cannot be used: .*(PicklingError|AttributeError): Can't pickle",
    ),
    # -- returns
    "nothing": (mine(score="def score(self, view): pass"), "cannot score: .* a NoneType; allowed"),
    "a list": (
        mine(score="def score(self, view): return [[1.0]]"),
        "cannot score: TypeError: the scores are a list; allowed: a torch.Tensor",
    ),
    "an array": (mine(score="def score(self, view): return view.keys.numpy()"), "are a ndarray"),
    "async": (mine(score="async def score(self, view): return view"), "are a coroutine"),
    "with what is being filled": (
        mine(score="def score(self, view): return view.keys.norm(dim=-1).mean((2, 3))"),
        r"shape \[2, 19\]; allowed: \[2, 18\], one for each layer and full block",
    ),
    "no layers": (mine(score=SCORE.replace("mean((2, 3))", "mean((0, 2, 3))")), "the shape"),
    "complex": (mine(score=SCORE + "* 1j"), "complex64, .*; allowed: dense real numbers"),
    "another device": (mine(score=SCORE + ".to('meta')"), "are on meta; allowed: cpu"),
    "not a number": (mine(score=SCORE + " * float('nan')"), "cannot score: every score is NaN"),
    "score raises": (
        mine(score="def score(self, view): return view.key"),
        r"cannot score: AttributeError: .*'key' \(line 15 of own_policy",
    ),
    "score exits": (mine(score="def score(self, view): sys.exit(3)"), "cannot score: SystemExit"),
    "no view": (mine(score="def score(self): pass"), "cannot score: TypeError: .* takes 1 pos"),
    "kernel of a mixin": (
        "class Loud:\n    def score(self, view): raise RuntimeError('mine')\n"
        + mine(score="", base="Loud, SemanticPolicy"),
        "cannot score: RuntimeError: mine",
    ),
} | {
    f"rank: {what}": (
        mine(score=f"def rank(self, candidates, num_tokens, extra_args): {body}"),
        f"cannot rank: .*{message}",
    )
    for what, body, message in (
        ("nothing", "pass", "the ranks are a NoneType; allowed: a sequence"),
        ("tuples", "return [(i % 2, i) for i in candidates]", r"\(0, 2\) is among the ranks"),
        ("text", "return [str(i) for i in candidates]", "'2' is among the ranks; allowed: num"),
        ("one missing", "return candidates[1:]", "there are 15 ranks for 16 blocks"),
        ("generator", "return (i for i in candidates)", "the ranks are a generator"),
        ("by block", "return dict.fromkeys(candidates, 1.0)", "the ranks are a dict"),
        ("raises", "return 1 / 0", "ZeroDivisionError"),
        ("NaN", "return [float('nan') for i in candidates]", "every rank is NaN"),
    )
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_refused_by_name(slip: str, write: Write) -> None:
    source, message = SLIPS[slip]
    refused(write(source), message)


def test_no_such_module_says_where_it_is_looked_for() -> None:
    with pytest.raises(ValueError, match=r"No module named 'nowhere'; .* in PYTHONPATH"):
        ServedPolicies.from_config("nowhere.Mine")


# -- what is right ---------------------------------------------------------------------

RIGHT: dict[str, str] = {
    "decorated": MINE,
    "not decorated": MINE.replace("@own\n", ""),
    "slots": MINE.replace("@own", "@dataclass(frozen=True, kw_only=True, slots=True)"),
    "parts of its own": mine("recent_tokens: int = 64", "kept_tokens: int = 64", base="KVPolicy"),
    "one part more": mine("kept_tokens: int = 64"),
    "the same sum": mine(
        "recent_tokens: int = 64",
        "kept_tokens: int = 64",
        "selected_tokens = property(lambda self: self.kept_tokens)",
        base="KVPolicy",
    ),
    "by rank": mine(score="def rank(self, candidates, *args): return candidates[::-1]"),
    "ranks in a tensor": mine(
        score="def rank(self, candidates, *args): return torch.tensor(candidates)"
    ),
    "whole scores": mine(score=SCORE + ".int()"),
    "yes or no": mine(score=SCORE + " > 2"),
    "half precision": mine(score=SCORE + ".bfloat16()"),
    "with a gradient": mine(score=SCORE + " * torch.nn.Parameter(torch.ones(()))"),
    "infinite": mine(score=SCORE + " * float('inf')"),
    "an option for queries": mine("num_queries: int = 4", "decay: float = 0.5"),
    "a wide window": mine("num_queries = 1024"),
    "a large budget": mine("recent_tokens: int = 10**6"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_is_served(what: str, write: Write) -> None:
    served = serve(write(RIGHT[what]))
    assert served.default.name == "mine"
    sums = [served.default.budget_tokens, sum(served.default.parts().values())]
    words = describe(served.default, 1)
    parts = words.partition(": ")[2].partition(" = ")[0].split(" + ")
    sums += [sum(int(part.split()[1]) for part in parts), served.default.budget(1).total]
    assert len(set(sums)) == 1, words


def test_what_is_tried_changes_nothing(write: Write) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    serve(write(mine(score=SCORE + " + torch.rand(())")))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_most_derived_of_score_and_rank_decides(write: Write) -> None:
    by_score = serve(write(mine(base="RandomPolicy"))).default
    assert by_score.scores_blocks
    rank = "def rank(self, candidates, *args): return candidates"
    by_rank = serve(write(mine(base="TOVAPolicy", score=rank))).default
    assert not by_rank.scores_blocks
    assert TOVAPolicy().scores_blocks


def test_a_mixins_score_leaves_an_inherited_kernel_behind(write: Write) -> None:
    source = f"class Loud:\n    {SCORE}\n" + mine(score="", base="Loud, SemanticPolicy")
    mine_class = type(serve(write(source)).default)
    assert mine_class.score_cached is KVPolicy.score_cached


def test_what_start_has_checked_does_not_change(write: Write) -> None:
    """A property is code too: it may fail the next time."""
    source = mine(
        "calls: ClassVar[list] = []",
        "@property\n    def decay(self):",
        "    self.calls.append(1)",
        "    return 1 / (len(self.calls) < 4)",
    )
    policy = serve(write(source)).default
    assert [policy.decay for _ in range(4)] == [1.0] * 4
    assert len(type(policy).calls) == 3


def test_what_fails_on_a_cpu_may_want_a_gpu(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the workers decide, once they have the device."""
    kernel = write(mine(score="def score(self, view): raise RuntimeError('no kernel for cpu')"))
    slip = write(mine(score="def score(self, view): return view.key"))
    refused(kernel, "cannot score: RuntimeError: no kernel for cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    serve(kernel)
    refused(slip, "cannot score: AttributeError")


# -- options ---------------------------------------------------------------------------

OPTIONS = mine(
    "weight: float = 0.5",
    "per_head: bool = False",
    "shift: int = -1",
    "kind: str = 'a'",
    "layer: int | None = None",
    "side: Literal['left', 'right', 3] = 'left'",
    "mode: Mode = Mode.FAST",
    "layers: tuple[int, ...] = ()",
    "pair: tuple[float, str] = (1.0, 'x')",
    "either: Optional['Literal[1] | str'] = None",
)


@pytest.mark.parametrize("header", [HEADER, "from __future__ import annotations\n" + HEADER])
def test_options_of_any_ordinary_type(header: str, write: Write) -> None:
    name = write(OPTIONS, header)
    mode = sys.modules
    given: dict[str, tuple[Any, Any]] = {
        "weight": (1, 1.0),
        "per_head": (True, True),
        "shift": (-7, -7),
        "kind": ("b", "b"),
        "layer": (3, 3),
        "side": (3, 3),
        "layers": ([1, 2], (1, 2)),
        "pair": ([0.25, "y"], (0.25, "y")),
        "either": ("z", "z"),
    }
    served = ServedPolicies.from_config({"name": name} | {k: v for k, (v, _) in given.items()})
    policy: Any = served.default
    assert {k: getattr(policy, k) for k in given} == {k: v for k, (_, v) in given.items()}
    mode = sys.modules[name.partition(".")[0]].Mode
    for value, member in (
        ("FAST", mode.FAST),
        ("fast", mode.FAST),
        ("SLOW", mode.SLOW),
        (2, mode.SLOW),
    ):
        policy = served.choose({"mode": value}, 32, 4000, 10)
        assert policy.mode is member
        assert served.choose(served.to_request(policy), 32, 4000, 10) == policy


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("weight", "heavy", "numbers"),
        ("weight", True, "numbers"),
        ("weight", float("nan"), "numbers"),
        ("per_head", 1, "true, false"),
        ("per_head", "true", "true, false"),
        ("shift", 1.5, "integers"),
        ("kind", 7, "text"),
        ("layer", "3", "integers or null"),
        ("side", "up", "left, right, 3"),
        ("side", True, "left, right, 3"),
        ("mode", "slow", "FAST, SLOW"),
        ("layers", 3, "a list of integers"),
        ("layers", [1, None], "a list of integers"),
        ("pair", [1.0], "a list of numbers, text"),
        ("selected_tokens", -1, "integers from 0 to"),
    ],
)
def test_an_option_of_another_type(option: str, value: Any, allowed: str, write: Write) -> None:
    name = write(OPTIONS)
    with pytest.raises(ValueError, match=f"^--kv-policy-config.{option} .* allowed: {allowed}"):
        ServedPolicies.from_config({"name": name, option: value})
    own = ServedPolicies.from_config(name)
    with pytest.raises(ValueError, match=f"^kv_policy.{option} .* allowed: {allowed}"):
        own.choose({option: value}, 32, 4000, 10)


def test_options_that_a_class_refuses(write: Write) -> None:
    source = mine(
        "weight: float = 0.5",
        "def __post_init__(self):\n        if self.weight > 1: raise ValueError('too heavy')",
    )
    name = write(source)
    refused(
        name, r"--kv-policy-config {'weight': 2.0}: .* cannot be made: .* too heavy", weight=2.0
    )
    with pytest.raises(ValueError, match=r"^kv_policy {.*'weight': 3.*}: .* too heavy"):
        ServedPolicies.from_config(name).choose({"weight": 3}, 32, 4000, 10)


def test_a_constructor_of_its_own_takes_options(write: Write) -> None:
    name = write(mine("def __init__(self): pass"))
    ServedPolicies.from_config(name)
    refused(name, "cannot be made: TypeError: .* argument 'sink_tokens'", sink_tokens=16)


def test_an_option_becomes_what_was_given(write: Write) -> None:
    source = mine(
        "weight: float = 0.5",
        "def __post_init__(self): object.__setattr__(self, 'weight', min(self.weight, 1.0))",
    )
    refused(write(source), "makes something else of weight", weight=2.0)


def test_a_request_gets_no_wider_window_than_workers_keep(write: Write) -> None:
    name = write(mine("num_queries: int = 4"))
    served = ServedPolicies.from_config({"name": name, "num_queries": 16})
    assert served.choose({"num_queries": 9}, 32, 4000, 10).num_queries == 9
    with pytest.raises(ValueError, match=r"looks at 17 queries; allowed: 16, as many as"):
        served.choose({"num_queries": 17}, 32, 4000, 10)


def test_a_score_is_not_switched_off_by_a_default(write: Write) -> None:
    """Asked for none, it gets none; where nobody asked, nobody would know."""
    name = write(mine("kept_tokens: int = 0", "recent_tokens: int = 64", base="KVPolicy"))
    refused(name, "score, which would never be called: kept_tokens is 0 by default")
    assert ServedPolicies.from_config({"name": name, "kept_tokens": 64}).default.scores_blocks
    assert not ServedPolicies.from_config({"name": name, "kept_tokens": 0}).default.scores_blocks


def test_reserved_names_are_those_that_are_read() -> None:
    named = {"name", "bounded", "choices"}
    options = {served.MAX_REQUEST_TOKENS, served.LAYER_GROUPS, served.LAYER_SKEW}
    options |= {served.RECALL_GIB, served.RECALL_BLOCKS}
    assert set(RESERVED) == named | {served.PIN, served.PIN_TOKENS} | options


# -- returns, where the engine calls ---------------------------------------------------


def test_ranks_are_floats() -> None:
    for ranks in (range(3), [0, 1.0, 2], (0, True + 0, 2), torch.arange(3)):
        assert checked_ranks(ranks, 3) == [0.0, 1.0, 2.0]
    for ranks in ("abc", {0: 1, 1: 2, 2: 3}, {1, 2, 3}, [1, 2, None], [1j, 2, 3], torch.ones(3, 1)):
        with pytest.raises(TypeError):
            checked_ranks(ranks, 3)


def test_a_rank_may_do_with_its_candidates_what_it_likes(write: Write) -> None:
    """What falls back to them, where it fails, still has all of them."""
    body = "def rank(self, candidates, *args): candidates.pop(); raise RuntimeError('sorry')"
    name = write(mine(score=body))
    policy = ServedPolicies.from_config(name).default
    candidates = [2, 3, 5]
    with pytest.raises(RuntimeError, match="sorry"):
        RequestBlocks().judge(policy, candidates, 256, {})
    assert candidates == [2, 3, 5]


def test_scores_are_float32() -> None:
    device = torch.device("cpu")
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool):
        scores = checked_scores(torch.ones(2, 3, dtype=dtype), 2, 3, device)
        assert scores.dtype == torch.float32
        assert scores.tolist() == [[1.0] * 3] * 2
    with pytest.raises(TypeError, match="sparse"):
        checked_scores(torch.ones(2, 3).to_sparse(), 2, 3, device)
