"""The same request to a server under a policy and to one without."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import requests
from schemathesis import Case

from ..server import Server
from ..soak.work import Answer, Work
from .cases import has_policy

SECONDS = 60
"""For an answer."""


@dataclass
class Comparison:
    """What both servers said.

    Args:
        server: under a policy.
        stock: without.
    """

    server: Server
    stock: Server
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By operation; of the server under a policy."""
    server_errors: Counter[str] = field(default_factory=Counter)
    """Statuses of 500 and more that the server without a policy gave as well, by message."""
    differences: list[dict[str, Any]] = field(default_factory=list)

    def send(self, operation: str, case: Case) -> None:
        """To both; a difference has to be a refusal of a policy, in words."""
        ours, said = outcome(case, self.server)
        theirs, said_without = outcome(case, self.stock)
        refused = ours == "400" != theirs and has_policy(case) and "kv_policy" in said
        self.outcomes[operation]["400, the policy" if refused else ours] += 1
        if ours != theirs and not refused:
            answers = {
                "with": f"{ours}: {said[:300]}",
                "without": f"{theirs}: {said_without[:300]}",
            }
            self.differences.append(
                {"operation": operation, "body": repr(case.body)[:2000], **answers}
            )
        elif ours.startswith("5"):
            self.server_errors[said[:160]] += 1


def outcome(case: Case, server: Server) -> tuple[str, str]:
    """The status of an answer, or what came instead of one; and its text."""
    try:
        answer = case.call(base_url=server.url, timeout=SECONDS)
    except requests.RequestException as error:
        return type(error).__name__, str(error)
    text = answer.text
    if answer.status_code == 200 and text.startswith(("data:", "event:")) and '"error":{' in text:
        return "200, then an error", text[-400:]
    return str(answer.status_code), text


class Witness(threading.Thread):
    """Someone who asks a server the same all the time, and knows the answer."""

    def __init__(self, server: Server, work: Work) -> None:
        super().__init__(daemon=True)
        self.server, self.work = server, work
        self.answers: Counter[str] = Counter()
        self.enough = threading.Event()

    def ask(self) -> Answer:
        return Answer.of(
            self.server.client.completions.create(
                model=self.server.model, logprobs=2, **self.work.arguments
            )
        )

    def run(self) -> None:
        alone = self.ask()
        while not self.enough.is_set():
            try:
                self.answers[alone.compare(self.ask().token_ids)] += 1
            except Exception as error:  # counted: it is what the run is for
                self.answers[f"{type(error).__name__}: {error}"] += 1
                self.enough.wait(1)
