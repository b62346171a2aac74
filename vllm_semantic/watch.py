"""A live view of a server under a KV policy, from its ``/metrics``."""

from __future__ import annotations

import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families

from .recall import GIB

Sample = Mapping[tuple[str, str], float]
"""Values by the name of a metric and the policy that it is of, ``""`` for vLLM's own, added up over
engines and servers."""

PREFIX = "vllm:kv_policy_"


class NoServerError(Exception):
    """Nothing at the address answers with metrics of vLLM; the message says what does."""


def sample(url: str) -> dict[tuple[str, str], float]:
    """What a server says of itself now.

    Args:
        url: ``http://host:port``.

    Raises:
        NoServerError: it does not answer, or not as vLLM does.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise NoServerError(f"{url}/metrics: {getattr(error, 'reason', error)}") from error
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for metric in family.samples:
            if metric.name.startswith("vllm:"):
                found[metric.name, metric.labels.get("policy", "")] += metric.value
    if ("vllm:num_requests_running", "") not in found:
        raise NoServerError(f"{url}/metrics: no metrics of vLLM; is --disable-log-stats on?")
    return dict(found)


def lines(before: Sample, now: Sample, seconds: float) -> Iterator[str]:
    """What to show: vLLM's own numbers, then a line for each policy.

    Args:
        before: a sample.
        now: a later one.
        seconds: between the two.
    """

    def rate(name: str, policy: str = "") -> float:
        key = (name, policy)
        return max(0.0, now.get(key, 0.0) - before.get(key, 0.0)) / seconds

    def value(name: str, policy: str = "") -> float:
        return now.get((name, policy), 0.0)

    yield (
        f"{value('vllm:num_requests_running'):.0f} requests run, "
        f"{value('vllm:num_requests_waiting'):.0f} wait; KV pool "
        f"{value('vllm:kv_cache_usage_perc'):.0%} in use; "
        f"{rate('vllm:generation_tokens_total'):.0f} tokens/s out, "
        f"{rate('vllm:prompt_tokens_total'):.0f} in; "
        f"{rate('vllm:num_preemptions_total'):.1f} preemptions/s"
    )
    asked = rate("vllm:prefix_cache_queries_total")
    hits = rate("vllm:prefix_cache_hits_total")
    yield f"prefix cache: {hits / asked:.0%} of tokens" if asked else "prefix cache: not asked"
    policies = sorted({policy for name, policy in now if name.startswith(PREFIX) and policy})
    if not policies:
        yield "no KV policy: vLLM as it is"
        return
    yield ""
    heads = ("given up", 10), ("evicted/s", 11), ("scored/s", 10), ("scoring", 9), ("failed", 8)
    yield f"{'policy':<16}" + "".join(f"{head:>{width}}" for head, width in heads)
    for policy in policies:
        yield (
            f"{policy:<16}"
            f"{value(f'{PREFIX}recovered_blocks', policy):>10.0f}"
            f"{rate(f'{PREFIX}evicted_blocks_total', policy):>11.1f}"
            f"{rate(f'{PREFIX}scored_blocks_total', policy):>10.1f}"
            f"{rate(f'{PREFIX}scoring_time_seconds_total', policy):>9.1%}"
            f"{value(f'{PREFIX}fallbacks_total', policy):>8.0f}"
        )
    host_bytes = sum(value(f"{PREFIX}host_bytes", policy) for policy in policies)
    if host_bytes:
        wanted = sum(rate(f"{PREFIX}wanted_blocks_total", policy) for policy in policies)
        recalled = sum(rate(f"{PREFIX}recalled_blocks_total", policy) for policy in policies)
        dropped = sum(value(f"{PREFIX}dropped_blocks_total", policy) for policy in policies)
        read = sum(rate(f"{PREFIX}read_blocks_total", policy) for policy in policies)
        found = f"; {1 - recalled / wanted:.0%} of what was wanted was here" if wanted else ""
        yield (
            f"host memory: {host_bytes / GIB:.2f} GiB of evicted blocks; {read:.1f} blocks/s read "
            f"there, {recalled:.1f} come back{found}; {dropped:.0f} dropped since the start"
        )
    yield ""
    yield (
        "given up: blocks that running requests would hold in the full cache; scoring: host time, "
        "share of a core; failed: evictions by age where the policy failed, since the start"
    )


def main(url: str, seconds: float, once: bool) -> int:
    """Print the view every so many seconds; 0 if it was shown, 1 if there is no server."""
    try:
        before, then = sample(url), time.monotonic()
        while True:
            time.sleep(seconds)
            now, at = sample(url), time.monotonic()
            view = "\n".join(lines(before, now, at - then))
            print(
                view if once else f"\033[2J\033[H{url}, every {seconds:g} s\n\n{view}", flush=True
            )
            if once:
                return 0
            before, then = now, at
    except NoServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
