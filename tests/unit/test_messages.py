"""Messages between scheduler and workers survive the way they really travel."""

from __future__ import annotations

import pickle

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from vllm_semantic.messages import (
    KVPolicyStep,
    ScoreRequest,
    attach_scores,
    attach_scoring_seconds,
    attach_step,
    scores_of,
    scoring_seconds_of,
    step_of,
)
from vllm_semantic.policies import SemanticPolicy

STEP = KVPolicyStep(
    evictions={0: {"a": [2, 5], "b": [1]}, 1: {"a": [3]}},
    score_requests={0: {"c": ScoreRequest(SemanticPolicy(), 64, [4, 7], [40, 70])}},
)
SCORES = {0: {"c": [0.25, -1.0]}, 1: {}}
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_step_survives_pickling(protocol: int) -> None:
    output = SchedulerOutput.make_empty()
    attach_step(output, STEP)
    received = pickle.loads(pickle.dumps(output, protocol))
    assert type(received) is SchedulerOutput
    assert step_of(received) == STEP
    assert step_of(received) is not STEP


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_survive_pickling(protocol: int) -> None:
    output = ModelRunnerOutput(req_ids=["c"], req_id_to_index={"c": 0})
    attach_scores(output, SCORES)
    attach_scoring_seconds(output, 0.25)
    received = pickle.loads(pickle.dumps(output, protocol))
    assert scores_of(received) == SCORES
    assert scoring_seconds_of(received) == 0.25


def test_a_step_survives_what_vllm_puts_between_processes() -> None:
    """The multiprocess executor broadcasts steps through a queue in shared memory."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    output = SchedulerOutput.make_empty()
    attach_step(output, STEP)
    writer = MessageQueue(n_reader=1, n_local_reader=1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), rank=0)
    writer.wait_until_ready()
    reader.wait_until_ready()
    writer.enqueue(output)
    assert step_of(reader.dequeue(timeout=10)) == STEP


def test_nothing_to_say_is_nothing_sent() -> None:
    assert step_of(SchedulerOutput.make_empty()) is None
    assert scores_of(EMPTY_MODEL_RUNNER_OUTPUT) == {}


def test_equality_of_vllms_own_fields_is_untouched() -> None:
    output, plain = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    attach_step(output, STEP)
    assert output == plain
