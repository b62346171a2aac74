"""What the middleware lets through, and what it answers itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from vllm_semantic.middleware import PLACES, MisplacedPolicies


def send_through(route: str, *parts: bytes, root: str = "", **scope: Any) -> tuple[Any, Any]:
    """What the application behind the middleware receives, and what the client does."""
    received: list[Any] = []
    answered: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.extend([await receive() for _ in range(len(parts) + 1)])

    async def talk() -> None:
        body = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
            for i, part in enumerate(parts)
        ]
        left = iter([*body, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(left)

        async def send(message: Any) -> None:
            answered.append(message)

        whole = {"type": "http", "method": "POST", "path": root + route, "root_path": root}
        whole |= {"query_string": b"", "headers": []} | scope
        await MisplacedPolicies(app)(whole, receive, send)

    asyncio.run(talk())
    return received, answered


BODY = json.dumps({"prompt": "a", "kv_policy": "full"}).encode()


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_a_policy_is_found_however_the_body_comes(cut: int) -> None:
    received, (start, body) = send_through("/v1/completions", BODY[:cut], BODY[cut:])
    assert not received
    assert start["status"] == 400
    error = json.loads(body["body"])["error"]
    assert error["param"] == "kv_policy"
    assert error["message"] == (
        "kv_policy is not read by /v1/completions; allowed: vllm_xargs.kv_policy"
    )


@pytest.mark.parametrize(
    ("route", "scope"),
    [
        ("/v1/embeddings", {}),
        ("/v1/completions", {"method": "GET"}),
        ("/v1/completions", {"type": "websocket"}),
    ],
)
def test_others_are_left_alone(route: str, scope: dict[str, Any]) -> None:
    received, answered = send_through(route, BODY, **scope)
    assert received[0]["body"] == BODY
    assert not answered


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"prompt": "kv_policy"}',
        b'{"kv_policy": ',
        b'["kv_policy"]',
        b'{"kv_policy": null}',
        b'{"vllm_xargs": {"kv_policy": "full"}}',
        b'{"metadata": {"kv_policy": "full"}}',
        b'{"messages": [{"kv_policy": "full"}]}',
        b'{"a": ' * 5000 + b'{"kv_policy": 1}' + b"}" * 5000,
    ],
)
def test_a_request_passes_as_it_came(body: bytes) -> None:
    half = len(body) // 2
    received, answered = send_through("/v1/chat/completions", body[:half], body[half:])
    assert [message.get("body") for message in received] == [body[:half], body[half:], None]
    assert received[-1]["type"] == "http.disconnect"
    assert not answered


@pytest.mark.parametrize("route", PLACES)
def test_behind_a_prefix_routes_are_the_same(route: str) -> None:
    received, (start, _) = send_through(route, BODY, root="/prefix")
    assert not received
    assert start["status"] == 400
