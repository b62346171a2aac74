"""vLLM's schedulers with a policy: what was evicted goes out, scores come in."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ..config import capacity
from ..messages import (
    BlockIndices,
    KVPolicyStep,
    attach_policy,
    attach_step,
    extra_args_of,
    note_turn,
    policy_of,
    scores_of,
    scoring_seconds_of,
    step_of,
)
from ..policies import KVPolicy
from ..served import REQUEST_KEY
from ..upstream.versions import end_with_error
from .host_pool import HostPool
from .kv_cache_manager import SemanticKVCacheManager
from .manager import SemanticManager, has_drafts_in_flight
from .offloading import Offloading
from .recalls import Recalls
from .spec import SemanticSpec
from .stats import attach_changes
from .whole_prompts import WholePrompts

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
    )
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, StreamingUpdate

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or INFO is lost

CONNECTORS = {"OffloadingConnector": Offloading, "ExampleConnector": WholePrompts}
"""What tells a KV connector which blocks are exact, by its name."""


class KVPolicyMixin(Scheduler):
    """A scheduler under a policy: a mixin to put before either of vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_spec_tokens and self.dynamic_sd_lookup is None:
            # Else vLLM fills a waiting request's one token up with drafts of nothing, for the sake
            # of full CUDA graphs, and does not expect the chunk to end at an eviction point.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)
        self.kv_cache_manager = SemanticKVCacheManager.take_over(self.kv_cache_manager)
        self.kv_policy_managers = {
            manager.kv_cache_group_id: manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, SemanticManager)
        }
        if not self.kv_policy_managers:
            raise ValueError(
                "--kv-policy: this model has no full-attention layer to put under a policy "
                f"(its KV cache groups: {self._group_kinds()})"
            )
        # Eviction points depend on a request alone: one manager finds them for all groups.
        self._points_manager = next(iter(self.kv_policy_managers.values()))
        spec = self._points_manager.kv_cache_spec
        assert isinstance(spec, SemanticSpec)
        self.served_policies, self._policy_block_size = spec.served, spec.block_size
        self.peak_kv_blocks = 0
        self.host_pool = HostPool(spec.host_slots) if spec.host_slots else None
        self.kv_cache_manager.host_pool = self.host_pool
        self._stopped_while_preempted: list[Request] = []
        for manager in self.kv_policy_managers.values():
            manager.requests = self.requests
            manager.is_first = manager is self._points_manager
            if self.host_pool is not None:
                manager.recalls = Recalls(self.host_pool, manager.kv_cache_group_id)
        if self.connector is not None:
            adapter = CONNECTORS[type(self.connector).__name__]
            self._adapter = adapter(self.connector, self._points_manager.max_prefix_hit_tokens)
        self._log_policy(spec)

    def add_request(self, request: Request) -> None:
        """Take a request in, under the policy it asked for."""
        if request.request_id in self.requests:  # a session's next chunk
            super().add_request(request)
            return
        policy = self._choose_policy(request, extra_args_of(request).get(REQUEST_KEY))
        attach_policy(request, policy or self.served_policies.default)
        super().add_request(request)
        if policy is None:
            self._end_with_error(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; tell the workers what was evicted and what to score."""
        for manager in self.kv_policy_managers.values():
            manager.num_steps += 1
        output = super().schedule(*args, **kwargs)
        step = KVPolicyStep()
        for group_id, manager in self.kv_policy_managers.items():
            if evictions := manager.take_evictions():
                step.evictions[group_id] = evictions
            if manager.recalls is not None and (recalls := manager.recalls.take()):
                step.recalls[group_id] = recalls
        if self.host_pool is not None:
            step.copies = self.host_pool.take_copies()
        if self.served_policies.rules:
            self._ask_for_scores(step, output)
        if step.evictions or step.keeps_queries or step.copies or step.recalls:
            attach_step(output, step)
        pool = self.kv_cache_manager.block_pool
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        self.peak_kv_blocks = max(self.peak_kv_blocks, held)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Settle a step; hand its scores to the managers of requests that still run."""
        step = step_of(scheduler_output)
        if step is not None:
            received = scores_of(model_runner_output)
            self._count_scoring(step, scoring_seconds_of(model_runner_output))
            for group_id, asked in step.score_requests.items():
                for request_id, scores in received.get(group_id, {}).items():
                    request = self.requests.get(request_id)
                    # Stale: the step ran before a preemption, the blocks are gone.
                    if request is not None and request.num_stale_output_tokens == 0:
                        self.kv_policy_managers[group_id].record_scores(
                            request_id, asked[request_id], scores
                        )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        while self._stopped_while_preempted:
            request = self._stopped_while_preempted.pop()
            # Since 0.33 vLLM has done so itself.
            if not any(request in queue for queue in (self.waiting, self.kv_holding_waiting)):
                self._enqueue_waiting_request(request)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's numbers of a step, with what the policy did; ``None`` without log stats."""
        scheduler_stats = super().make_stats(*args, **kwargs)
        if scheduler_stats is not None:
            if self.host_pool is not None:
                name = self.served_policies.default.name
                of_server = self._points_manager.stats_by_policy[name]
                of_server.host_bytes = (
                    self.host_pool.num_used * self._points_manager.kv_cache_spec.slot_bytes
                )
            for manager in self.kv_policy_managers.values():
                for policy, stats in manager.stats_by_policy.items():
                    attach_changes(scheduler_stats, policy, stats)
        return scheduler_stats

    def _choose_policy(self, request: Request, asked: Any) -> KVPolicy | None:
        """What a request asks for; ``None`` where it may not have it.

        That is refused by now, if the request came through vLLM's ``InputProcessor``.
        """
        if asked is None:
            return self.served_policies.default
        try:
            return self.served_policies.choose(
                asked, self._policy_block_size, request.num_prompt_tokens, request.max_tokens
            )
        except ValueError as error:
            logger.error("Request %s ends with an error: %s", request.request_id, error)
            return None

    def _end_with_error(self, request: Request) -> None:
        """End a request that is waiting in the next step, as vLLM does where a grammar fails."""
        end_with_error(self.grammar_compile_error_reqs, request.request_id)

    def _count_scoring(self, step: KVPolicyStep, seconds: float) -> None:
        """Share the time of a step among its requests' policies, by the blocks that were scored."""
        requests = [(g, r) for g, asked in step.score_requests.items() for r in asked.values()]
        num_blocks = sum(len(request.block_indices) for _, request in requests)
        for group_id, request in requests:
            stats = self.kv_policy_managers[group_id].stats_by_policy[request.policy.name]
            part = len(request.block_indices) / num_blocks
            stats.scoring_microseconds += round(1e6 * seconds * part)

    def _ask_for_scores(self, step: KVPolicyStep, output: SchedulerOutput) -> None:
        """What the workers have to score after the step, whose queries they have to keep, and who
        sees host memory."""
        points = self._points_manager
        for request_id, num_new in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            # vLLM has already advanced this to the end of the step.
            end = request.num_computed_tokens
            if end <= points.quiet_until.get(request_id, 0):
                continue
            if points.keeps_queries(request, end - num_new, num_new):
                step.keeps_queries.add(request_id)
            for group_id, manager in self.kv_policy_managers.items():
                asked = manager.score_request(request, end)
                if asked is None:  # in no group, then
                    break
                step.score_requests.setdefault(group_id, {})[request_id] = asked
            if self.host_pool is None:
                continue
            for group_id, manager in self.kv_policy_managers.items():
                if slots := manager.reads(request, end - num_new):
                    step.reads.setdefault(group_id, {})[request_id] = slots

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Let a session's prompt grow: what was eviction points stays, what comes is found anew."""
        # Drafts that were accepted behind the last token of the answer are none of the prompt.
        num_computed_tokens = min(session.num_computed_tokens, session.num_tokens - 1)
        # All but the token that was sampled last. Where the session was preempted with its last
        # token in flight, nothing is computed, and vLLM would keep nothing.
        session.num_computed_tokens = session.num_tokens - 1
        note_turn(session)
        super()._update_request_as_session(session, update)
        session.num_computed_tokens = num_computed_tokens
        self._forget_progress(session)
        began_with = policy_of(session, self.served_policies.default)
        before = self.served_policies.to_request(began_with)
        policy = self._choose_policy(session, extra_args_of(session).get(REQUEST_KEY, before))
        if policy != began_with:
            if policy is not None:
                logger.error(
                    "Request %s ends with an error: %s %s in a later chunk of a session; "
                    "allowed: %s, the policy that it began with",
                    session.request_id,
                    REQUEST_KEY,
                    self.served_policies.to_request(policy),
                    before,
                )
            self._end_with_error(session)

    def _handle_stopped_request(self, request: Request) -> bool:
        """Go on with a session, also if it was preempted with its last token in flight.

        vLLM takes such a request out of its queues once all outputs of the step are settled.
        """
        finished = super()._handle_stopped_request(request)
        if not finished and not request.num_computed_tokens:
            self._stopped_while_preempted.append(request)
        return finished

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """End a chunk at the request's next eviction point; vLLM's last word on its size.

        With none the request is passed over, until its steps in flight are settled.
        """
        if num_new_tokens <= 1 and not has_drafts_in_flight(request):
            return max(num_new_tokens, 0)  # nothing to shorten; vLLM reserves for drafts only
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        return self._points_manager.clip_to_eviction_point(
            request, num_computed_tokens, num_new_tokens
        )

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Look a prefix up, but leave the queries of the first eviction to be computed.

        Since 0.33 vLLM has a limit of its own, which is within what is found here.
        """
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(
            request, *args, **kwargs
        )
        limit = self._points_manager.max_prefix_hit_tokens(request)
        if limit is not None and max(num_tokens, boundary) > limit:
            # Not cut short: a layer with a window holds the end of one hit, not of another.
            lookup = self.kv_cache_manager.coordinator.find_longest_cache_hit
            found, num_tokens, num_uncached = lookup(request.block_hashes, limit)
            blocks = self.kv_cache_manager.create_kv_cache_blocks(found)
            boundary = num_tokens + num_uncached if num_uncached else 0
        return blocks, num_tokens, boundary, diverged

    def _build_kv_connector_meta(
        self, connector: KVConnectorBase_V1, scheduler_output: SchedulerOutput
    ) -> KVConnectorMetadata:
        """Say what the step will copy; first, which blocks it may overwrite."""
        evicted: defaultdict[str, dict[int, BlockIndices]] = defaultdict(dict)
        for group_id, manager in self.kv_policy_managers.items():
            for request_id, blocks in manager.evicting.items():
                evicted[request_id][group_id] = blocks
        for request_id, of_groups in evicted.items():
            num_exact = self._points_manager.num_exact_tokens(request_id)
            self._adapter.lose(request_id, int(num_exact), of_groups)
        return super()._build_kv_connector_meta(connector, self._adapter.offered(scheduler_output))

    def _forget_progress(self, request: Request) -> None:
        """What is remembered of a request up to its next point no longer holds."""
        self.kv_cache_manager.forget(request.request_id)
        self._points_manager.forget_points(request.request_id)

    def _group_kinds(self) -> str:
        groups = self.kv_cache_config.kv_cache_groups
        return ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"

    def _log_policy(self, spec: SemanticSpec) -> None:
        num_groups = len(self.kv_policy_managers)
        logger.info("%s", spec.served.describe_default(spec.block_size))
        num_blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        full_blocks = cdiv(self.max_model_len, spec.block_size)
        held_blocks, shared_blocks = full_blocks, 0
        if spec.policy.bounded:
            # A step's tokens are shared by all requests; each also fills one block.
            held_blocks = min(full_blocks, spec.policy.budget(spec.block_size).total + 1)
            shared_blocks = cdiv(spec.max_in_flight_tokens, spec.block_size)
        logger.info(
            "KV policy %s: %d blocks hold %d requests of %d tokens; the full cache would hold %d",
            spec.policy.name,
            num_blocks,
            capacity(num_blocks - num_groups * shared_blocks, num_groups * held_blocks),
            self.max_model_len,
            capacity(num_blocks, num_groups * full_blocks),
        )
        if self.host_pool is not None:
            num_tokens = self.host_pool.num_slots * spec.block_size // num_groups
            logger.info(
                "KV policy %s: host memory for %d evicted blocks of %d bytes, %s tokens",
                spec.policy.name,
                self.host_pool.num_slots,
                spec.slot_bytes,
                f"{num_tokens:,}",
            )
        cache_config = self.vllm_config.cache_config
        if spec.policy.bounded and cache_config.kv_cache_size_tokens:
            logger.info(
                "KV policy %s: the KV cache size above, %s tokens, is %.2f requests of %d tokens "
                "that each have their budget and %d tokens in flight; the pool has %d blocks of "
                "%d tokens",
                spec.policy.name,
                f"{cache_config.kv_cache_size_tokens:,}",
                cache_config.kv_cache_max_concurrency,
                self.max_model_len,
                spec.max_in_flight_tokens,
                num_blocks,
                spec.block_size,
            )


class SemanticScheduler(KVPolicyMixin, Scheduler):
    """vLLM's scheduler with a policy."""


class AsyncSemanticScheduler(KVPolicyMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with a policy: scores arrive a step later."""
