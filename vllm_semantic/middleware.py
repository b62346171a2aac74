"""Refuses an HTTP request with a policy in a place where its route does not read one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .engine.refusal import KVPolicyError
from .frontend import check_places
from .served import REQUEST_KEY

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

XARGS = ("vllm_xargs", REQUEST_KEY)

PLACES: dict[str, tuple[str, ...] | None] = {
    "/v1/completions": XARGS,
    "/v1/chat/completions": XARGS,
    "/v1/chat/completions/batch": XARGS,
    "/v1/responses": XARGS,
    "/v1/messages": XARGS,
    "/invocations": XARGS,
    "/v1/completions/render": XARGS,
    "/v1/chat/completions/render": XARGS,
    "/v1/responses/render": XARGS,
    "/v1/messages/render": XARGS,
    "/inference/v1/generate": ("sampling_params", "extra_args", REQUEST_KEY),
    "/cohere/v2/chat": None,
    "/generative_scoring": None,
    "/v1/systemone": None,
}
"""Where each route that generates reads a policy; ``None``: nowhere. Others are left alone."""


class MisplacedPolicies:
    """ASGI middleware: a policy that would be ignored is a 400 that names the right place.

    A body without the word ``kv_policy`` is passed on without being parsed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once its body has been looked at, or answer it."""
        route = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or route not in PLACES:
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        try:
            _check(route, scope["query_string"], messages)
        except ValueError as error:
            await _answer(error, scope, receive, send)
            return
        read = iter(messages)

        async def again() -> Message:
            message = next(read, None)
            return await receive() if message is None else message

        await self.app(scope, again, send)


def _check(route: str, query: bytes, messages: list[Message]) -> None:
    """Raises: ValueError, a policy stands where it is not read."""
    word = REQUEST_KEY.encode()
    if word in query:
        check_places({"query": {REQUEST_KEY: query}}, PLACES[route], route)
    body = b"".join(message.get("body", b"") for message in messages)
    if word not in body:
        return
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        return  # no JSON: vLLM says so
    if isinstance(read, dict):
        check_places(read, PLACES[route], route)


async def _answer(error: ValueError, scope: Scope, receive: Receive, send: Send) -> None:
    """As vLLM answers what it cannot validate."""
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    answer = create_error_response(KVPolicyError(str(error)))
    await JSONResponse(answer.model_dump(), answer.error.code)(scope, receive, send)
