"""A real ``vllm serve`` process, driven by the real OpenAI client."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic import watch

from ..fuzz.cases import each_of, operations
from ..fuzz.compare import outcome
from ..policy_requests import asked_of_us, json_values
from ..server import BLOCK_SIZE, SMALL_BUDGET, Server, serve_command

POOL_BLOCKS = 48
FLAGS = [
    *SMALL_BUDGET,
    f"--num-gpu-blocks-override={POOL_BLOCKS}",
    "--max-num-seqs=6",
    "--enable-log-requests",
]


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    script = repo / "examples" / "serve.sh"
    with Server(repo / "models" / "lookback-5m", log, FLAGS, script=script) as server:
        server.wait()
        yield server
        assert server.process.poll() is None, "the server died"
        server.wait_until_idle()


def long_text(repo: Path, num_chars: int) -> str:
    path = sorted((repo / "benchmarks" / "texts" / "pg19").glob("*.txt"))[0]
    return path.read_text()[:num_chars]


def test_start_log_says_what_runs(server: Server) -> None:
    log = server.log.read_text()
    assert "KV policy semantic: sink 8 + recent 64 + semantic 64 = 136 tokens" in log
    assert f"held as 5 blocks of {BLOCK_SIZE} (160 tokens) per request" in log
    assert f"KV policy semantic: {POOL_BLOCKS - 1} blocks hold 6 requests of 2048 tokens" in log
    assert "the full cache would hold 0" in log


def test_requests_are_logged(server: Server) -> None:
    test_chat(server)
    assert "Received request chatcmpl-" in server.log.read_text()


def test_chat(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=16,
        temperature=0,
    )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16


def run_example(name: str, server: Server, repo: Path) -> str:
    """What an example prints, as written."""
    run = subprocess.run(
        [sys.executable, str(repo / "examples" / name)],
        env=os.environ | {"PORT": str(server.port)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_example_client(server: Server, repo: Path) -> None:
    """With a policy of its own, streamed."""
    assert len(run_example("client.py", server, repo).strip()) > 50


def test_the_example_chat(server: Server, repo: Path) -> None:
    """The third turn asks for what was said in the first, and evicted since."""
    without, with_recall = run_example("chat.py", server, repo).strip().splitlines()
    assert with_recall == "with recall: 67326"
    assert without.startswith("without recall: ") != without.endswith("67326")


def test_a_server_is_watched(
    server: Server, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a request evicts: what is shown is what its metrics say."""
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch.main, server.url, 4.0, True)
        test_prompt_longer_than_the_budget_is_streamed(server, repo)
        assert watched.result() == 0
    shown = capsys.readouterr().out
    assert re.match(r"\d+ requests run, \d+ wait; KV pool \d+% in use; ", shown)
    (row,) = re.findall(r"^semantic +(\d+) +([\d.]+) +([\d.]+) +[\d.]+% +0$", shown, re.MULTILINE)
    assert float(row[1]) > 0
    assert float(row[2]) > 0
    assert watch.main("http://127.0.0.1:9", 1.0, True) == 1
    assert "127.0.0.1:9/metrics: " in capsys.readouterr().err


def test_prompt_longer_than_the_budget_is_streamed(server: Server, repo: Path) -> None:
    """Eviction fired: prompt and answer would not fit the pool otherwise."""
    prompt = long_text(repo, 5200)
    chunks = list(
        server.client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=300,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 300
    assert usage.total_tokens > (POOL_BLOCKS - 1) * BLOCK_SIZE
    assert len([chunk for chunk in chunks if chunk.choices]) > 100, "it came in one piece"


def test_parallel_requests_need_eviction(server: Server, repo: Path) -> None:
    """Eight at once, six at a time: more tokens than six full caches in this pool could hold."""
    prompt = long_text(repo, 1200)

    def complete(i: int) -> tuple[int, int]:
        answer = server.client.completions.create(
            model=server.model,
            prompt=f"{i}. {prompt}",
            max_tokens=800,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.usage.total_tokens

    preemptions = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(complete, range(8)))
    assert [completion for completion, _ in results] == [800] * 8
    assert 6 * min(total for _, total in results) > 4 * POOL_BLOCKS * BLOCK_SIZE
    assert server.metric("vllm:num_preemptions_total") == preemptions
    server.wait_until_idle()


def test_metrics_count_what_was_evicted(server: Server, repo: Path) -> None:
    names = ("evicting_requests", "evictions", "evicted_blocks", "score_age_steps_count")
    names += ("scored_blocks", "scoring_time_seconds")

    def read() -> dict[str, float]:
        suffix = {"score_age_steps_count": ""}
        labels = f'{{engine="0",model_name="{server.model}",policy="semantic"}}'
        return {
            name: server.metric(f"vllm:kv_policy_{name}{suffix.get(name, '_total')}{labels}")
            for name in names
        }

    before = read()
    server.client.completions.create(
        model=server.model, prompt=long_text(repo, 2400), max_tokens=100, temperature=0
    )
    server.wait_until_idle()
    more = {name: value - before[name] for name, value in read().items()}
    assert more["evicting_requests"] == 1
    assert more["score_age_steps_count"] == more["evictions"] > 2
    assert more["evicted_blocks"] > more["evictions"]
    assert more["scored_blocks"] > 5 * more["evictions"], "all that is held, budget and more"
    assert more["scoring_time_seconds"] > 0
    assert server.metric("vllm:kv_policy_recovered_blocks") == 0, "nothing runs"
    assert "KV fetch" not in server.log.read_text(), "vLLM's own log lines are as ever"


def test_disconnect_returns_blocks(server: Server, repo: Path) -> None:
    """Clients that go away in mid-stream leave nothing behind, and others go on."""
    prompt = long_text(repo, 2400)

    def hang_up(i: int) -> None:
        stream = server.client.completions.create(
            model=server.model, prompt=f"{i}. {prompt}", max_tokens=1200, stream=True
        )
        for _ in zip(range(5), stream, strict=False):
            pass
        stream.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hang_up, range(8)))
    server.wait_until_idle()
    assert server.metric("vllm:request_success_total") > 0
    test_chat(server)


def test_bad_requests_are_answered(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model=server.model, prompt="a", max_tokens=-1)
    with pytest.raises(openai.BadRequestError):
        server.client.completions.create(model=server.model, prompt="word " * 9000, max_tokens=1)
    test_chat(server)


def test_requests_choose_a_policy(server: Server, repo: Path) -> None:
    """Over HTTP as JSON text: vLLM's ``vllm_xargs`` takes no objects."""
    prompt = long_text(repo, 2400)

    def complete(asked: dict[str, Any] | str | None) -> str:
        text = asked if isinstance(asked, str) or asked is None else json.dumps(asked)
        answer = server.client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=200,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"kv_policy": text} if text else None},
        )
        return answer.choices[0].text

    own = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 64}
    streaming = {"name": "streaming", "sink_tokens": 32, "recent_tokens": 64}
    asked = [None, {"name": "semantic", **own}, streaming, {"pin_prompt_tokens": 128}, "semantic"]
    with ThreadPoolExecutor(len(asked)) as pool:
        default, spelled_out, streamed, pinned, named = pool.map(complete, asked)
    assert default == spelled_out == named
    assert len({default, streamed, pinned}) == 3, "each keeps other blocks"


def test_a_system_message_is_pinned(server: Server, repo: Path) -> None:
    """The same as pinning the tokens of its part of the prompt, and refused if it is too long."""

    def chat(system: str, asked: dict[str, Any]) -> str:
        answer = server.client.chat.completions.create(
            model=server.model,
            messages=[
                {"role": "system", "content": system},
                {"role": "user", "content": long_text(repo, 2400)},
            ],
            max_tokens=100,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": {"kv_policy": json.dumps(asked)}},
        )
        return answer.choices[0].message.content or ""

    system = long_text(repo, 180)
    count = urllib.request.Request(
        f"{server.url}/tokenize",
        json.dumps(
            {"model": server.model, "messages": [{"role": "system", "content": system}]}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    num_tokens = json.loads(urllib.request.urlopen(count, timeout=30).read())["count"]
    assert 64 < num_tokens <= 128
    pinned = chat(system, {"pin": "system"})
    assert pinned == chat(system, {"pin_prompt_tokens": num_tokens})
    assert pinned != chat(system, {})
    with pytest.raises(openai.BadRequestError, match=r"kv_policy .* allowed: 8 blocks"):
        chat(long_text(repo, 1000), {"pin": "system"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ('{"name": "semantic"', "kv_policy '{.*' is not JSON"),
        ("smart", "kv_policy.name 'smart' is not served; allowed: full, streaming, semantic"),
        (7, "kv_policy 7 is neither a name nor of the form"),
        ('{"semantic_tokens": 1e9}', "kv_policy.semantic_tokens 1000000000.0 is not a number"),
        ('{"semantic_tokens": 4096}', "kv_policy .* allowed: 8 blocks, the server's"),
        ('{"pin": "system"}', "kv_policy.pin 'system' needs a chat that begins with a system"),
        ("[" * 50000, "kv_policy.name .* is not served"),
    ],
)
def test_a_bad_policy_is_a_bad_request(
    asked: Any, message: str, stream: bool, server: Server
) -> None:
    """Also of a streamed answer, before it begins."""
    arguments: dict[str, Any] = {
        "model": server.model,
        "max_tokens": 400,
        "stream": stream,
        "extra_body": {"ignore_eos": True, "vllm_xargs": {"kv_policy": asked}},
    }
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.completions.create(prompt="word " * 300, **arguments)
    messages = [{"role": "user", "content": "word " * 300}]
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(messages=messages, **arguments)
    test_chat(server)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    json_values
    | st.fixed_dictionaries({"kv_policy": json_values | asked_of_us.map(json.dumps)})
    | asked_of_us.map(lambda asked: {"kv_policy": asked})
)
def test_any_json_is_answered(server: Server, xargs: Any) -> None:
    """What is no policy, nor ``vllm_xargs`` at all, is a bad request and nothing worse."""
    body = {"model": server.model, "prompt": "a", "max_tokens": 1, "vllm_xargs": xargs}
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=json.dumps(body),  # NaN and infinities, which httpx itself would refuse to send
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code in (200, 400), answer.text


def test_requests_by_the_servers_own_document(server: Server) -> None:
    """A few of each operation; for more, beside a server without a policy: tests.fuzz."""
    document = json.load(urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60))
    outcomes: Counter[str] = Counter()
    for _, cases in operations(document, server.model):
        each_of(cases, lambda case: outcomes.update([outcome(case, server)[0]]), examples=3)
    # 501: /v1/systemone, of a model without such a head.
    assert outcomes.keys() <= {"200", "400", "404", "422", "501"}, outcomes
    assert outcomes["200"] > 3
    test_chat(server)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--kv-policy", "smart"], 2, "'smart' is not known; allowed: full, streaming, semantic"),
        (
            ["--kv-policy", "semantic", "--kv-policy-config.recent_tokens", "-5"],
            1,
            "--kv-policy-config.recent_tokens -5 is not a number of tokens; allowed: integers",
        ),
    ],
)
def test_bad_flags_end_the_process(flags: list[str], code: int, message: str, repo: Path) -> None:
    run = subprocess.run(
        [*serve_command(repo / "models" / "lookback-5m"), *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == code
    assert message in run.stderr + run.stdout
