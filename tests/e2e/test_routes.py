"""Every route of a real server that takes a policy, or would have ignored one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ..server import SMALL_BUDGET, Server

FLAGS = [
    *SMALL_BUDGET,
    "--num-gpu-blocks-override=96",
    "--enable-scale-out",  # /inference/v1/generate
]
STREAMING = json.dumps({"name": "streaming", "sink_tokens": 32, "recent_tokens": 64})
WORDS = "word " * 300
"""Of a prompt that goes over budget."""


def with_xargs(**body: Any) -> Any:
    """A body of which the policy, as JSON text, is all that is missing."""
    return lambda asked: {**body, **({"vllm_xargs": {"kv_policy": asked}} if asked else {})}


def generate(asked: Any) -> dict[str, Any]:
    extra_args = {"kv_policy": asked} if asked else None
    sampling = {"max_tokens": 40, "ignore_eos": True, "extra_args": extra_args}
    return {"token_ids": [7, 8, 9] * 100, "sampling_params": sampling}


CHAT = [{"role": "user", "content": WORDS}]
ROUTES: dict[str, tuple[str, Any]] = {
    "completions": ("/v1/completions", with_xargs(prompt=WORDS, max_tokens=40)),
    "two samples": ("/v1/completions", with_xargs(prompt=WORDS, max_tokens=40, n=2)),
    "two prompts": ("/v1/completions", with_xargs(prompt=["a", WORDS], max_tokens=40)),
    "chat": ("/v1/chat/completions", with_xargs(messages=CHAT, max_tokens=40)),
    "chats": ("/v1/chat/completions/batch", with_xargs(messages=[CHAT, CHAT], max_tokens=40)),
    "Responses": ("/v1/responses", with_xargs(input=WORDS, max_output_tokens=40)),
    "Messages": ("/v1/messages", with_xargs(messages=CHAT, max_tokens=40)),
    "SageMaker": ("/invocations", with_xargs(messages=CHAT, max_tokens=40)),
    "tokens": ("/inference/v1/generate", generate),
    "beams": (
        "/v1/completions",
        with_xargs(prompt=WORDS, max_tokens=3, n=2, use_beam_search=True),
    ),
    "beams of a chat": (
        "/v1/chat/completions",
        with_xargs(messages=CHAT, max_tokens=3, n=2, use_beam_search=True),
    ),
}
STREAMED = set(ROUTES) - {"chats", "beams"}
"""vLLM streams no answers of the others."""


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("routes") / "log"
    with Server(repo / "models" / "lookback-5m", log, FLAGS) as server:
        server.wait()
        yield server
        assert server.process.poll() is None, "the server died"
        server.wait_until_idle()


def post(server: Server, route: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
    body = {"model": server.model, **body}
    return httpx.post(f"{server.url}{route}", json=body, timeout=120, **kwargs)


def evicted(server: Server, policy: str) -> float:
    labels = f'{{engine="0",model_name="{server.model}",policy="{policy}"}}'
    return server.metric(f"vllm:kv_policy_evicted_blocks_total{labels}")


def runs_under(server: Server, route: str, body: dict[str, Any]) -> set[str]:
    """Answer a request; the policies that evicted blocks for it."""
    policies = ("streaming", "semantic")
    before = {policy: evicted(server, policy) for policy in policies}
    answer = post(server, route, body)
    assert answer.status_code == 200, answer.text
    assert '"error":' not in answer.text.replace('"error":null', "")
    server.wait_until_idle()
    return {policy for policy in policies if evicted(server, policy) > before[policy]}


@pytest.mark.parametrize("how", ROUTES)
def test_a_request_runs_under_the_policy_that_it_asks_for(how: str, server: Server) -> None:
    route, body = ROUTES[how]
    assert runs_under(server, route, body(None)) == {"semantic"}
    assert runs_under(server, route, body(STREAMING)) == {"streaming"}
    if how in STREAMED:
        assert runs_under(server, route, {**body(STREAMING), "stream": True}) == {"streaming"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("full", "kv_policy {'name': 'full'} keeps"),
        ("smart", "kv_policy.name 'smart' is not served; allowed: full, streaming, semantic"),
        ('{"semantic_tokens": 4096}', "allowed: 8 blocks, the server's"),
        ('{"pin_prompt_tokens": 250}', "allowed: 8 blocks, the server's"),
    ],
)
@pytest.mark.parametrize("how", ROUTES)
def test_what_a_request_may_not_have_is_a_bad_request(
    how: str, asked: str, message: str, stream: bool, server: Server
) -> None:
    """With the first byte of the answer, streamed or not."""
    if stream and how not in STREAMED:
        pytest.skip("vLLM does not stream this")
    route, body = ROUTES[how]
    answer = post(server, route, {**body(asked), "stream": stream})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    if how != "Messages":  # whose errors have no such field
        assert error["param"] == "kv_policy"


LONG_ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 400},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "a"}]]},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400},
}


@pytest.mark.parametrize("route", LONG_ANSWERS)
def test_an_answer_too_long_is_a_bad_request(route: str, server: Server) -> None:
    """Prompts that fit into the full cache; their answers do not, or may be of any length."""
    body = {**LONG_ANSWERS[route], "vllm_xargs": {"kv_policy": "full"}}
    streamed = [False] if route.endswith("batch") else [False, True]
    for stream in streamed:
        answer = post(server, route, {**body, "stream": stream})
        assert answer.status_code == 400, answer.text
        assert "kv_policy {'name': 'full'} keeps" in answer.text


def test_tokens_without_a_limit_are_a_bad_request(server: Server) -> None:
    sampling = {"extra_args": {"kv_policy": "full"}}
    for stream in (False, True):
        body = {"token_ids": [7, 8, 9], "sampling_params": sampling, "stream": stream}
        answer = post(server, "/inference/v1/generate", body)
        assert answer.status_code == 400, answer.text
        assert "kv_policy {'name': 'full'} keeps" in answer.text


MISPLACED: dict[str, dict[str, Any]] = {
    "kv_policy": {"kv_policy": "full"},
    "kv_policy_config": {"kv_policy_config": {"semantic_tokens": 32}},
    "extra_args.kv_policy": {"extra_args": {"kv_policy": "full"}},
    "extra_body.vllm_xargs.kv_policy": {"extra_body": {"vllm_xargs": {"kv_policy": "full"}}},
    "chat_template_kwargs.kv_policy": {"chat_template_kwargs": {"kv_policy": "full"}},
    "vllm_xargs.kv_policy_config": {"vllm_xargs": {"kv_policy_config": "full"}},
    "sampling_params.kv_policy": {"sampling_params": {"kv_policy": "full"}},
    "sampling_params.vllm_xargs.kv_policy": {
        "sampling_params": {"vllm_xargs": {"kv_policy": "full"}}
    },
}


@pytest.mark.parametrize("where", MISPLACED)
@pytest.mark.parametrize("how", ROUTES)
def test_a_policy_elsewhere_is_a_bad_request(how: str, where: str, server: Server) -> None:
    route, body = ROUTES[how]
    answer = post(server, route, {**body(None), **MISPLACED[where]})
    assert answer.status_code == 400, answer.text
    place = "sampling_params.extra_args" if how == "tokens" else "vllm_xargs"
    assert answer.json()["error"]["message"] == (
        f"{where} is not read by {route}; allowed: {place}.kv_policy"
    )


def test_routes_without_a_policy_refuse_one(server: Server) -> None:
    body = {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}
    for xargs in ({"kv_policy": "full"}, {"vllm_xargs": {"kv_policy": "full"}}):
        answer = post(server, "/generative_scoring", {**body, **xargs})
        assert answer.status_code == 400, answer.text
        assert "is not read by /generative_scoring; allowed: none" in answer.text
    assert post(server, "/generative_scoring", body).status_code == 200


def test_a_policy_in_the_url_is_a_bad_request(server: Server) -> None:
    client = server.client
    with pytest.raises(openai.BadRequestError, match=r"query.kv_policy is not read by /v1/compl"):
        client.completions.create(
            model=server.model, prompt="a", max_tokens=1, extra_query={"kv_policy": "full"}
        )


def test_what_only_speaks_of_policies_is_answered(server: Server) -> None:
    """Names of the client's own in content, schemas, tools and notes."""
    schema = {"type": "object", "properties": {"kv_policy": {"type": "integer"}}}
    answer = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": '{"kv_policy": "full"}'}],
        max_tokens=4,
        metadata={"kv_policy": "full"},
        tools=[{"type": "function", "function": {"name": "kv_policy", "parameters": schema}}],
        tool_choice="none",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "kv_policy", "schema": schema},
        },
        extra_body={"vllm_xargs": {"kv_policy": STREAMING}, "kv_policy": None},
    )
    assert answer.choices[0].message.content


def test_a_batch_file(repo: Path, tmp_path: Path) -> None:
    """``vllm run-batch``: each line has its own status."""
    model = str(repo / "models" / "lookback-5m")
    chat = {"model": model, "messages": CHAT, "max_tokens": 3}
    bodies: dict[str, tuple[dict[str, Any], int, str]] = {
        "plain": ({}, 200, ""),
        "streaming": ({"vllm_xargs": {"kv_policy": STREAMING}}, 200, ""),
        "beams": (
            {"vllm_xargs": {"kv_policy": STREAMING}, "use_beam_search": True, "n": 2},
            200,
            "",
        ),
        "full": ({"vllm_xargs": {"kv_policy": "full"}}, 400, "kv_policy {'name': 'full'} keeps"),
        "misplaced": ({"kv_policy": "full"}, 400, "kv_policy is not read by /v1/chat/completions"),
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": chat | more}
        for name, (more, _, _) in bodies.items()
    ]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    vllm = str(Path(sys.executable).parent / "vllm")
    run = subprocess.run(
        [vllm, "run-batch", "-i", asked, "-o", answered, "--model", model, *SMALL_BUDGET],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for line in map(json.loads, answered.read_text().splitlines()):
        _, status, message = bodies.pop(line["custom_id"])
        assert line["response"]["status_code"] == status, line
        assert message in json.dumps(line["error"])
    assert not bodies
