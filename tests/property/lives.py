"""How long a state machine of the property tests lives, and how often."""

from __future__ import annotations

from collections.abc import Callable
from random import randrange

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

BATCH = 100
"""Lives of one seed. What a seed draws at first colours all that follows, so there are several."""


def run_lives(
    machine: Callable[[], RuleBasedStateMachine], lives: int, *, repeat: bool = True
) -> None:
    """Run a state machine so many times, at most 40 steps each.

    Args:
        machine: makes one.
        lives: how many, in batches of :data:`BATCH`.
        repeat: the same seeds each time; others otherwise.

    Raises:
        Exception: what the shortest life raises that breaks an invariant.
    """
    for batch in range(0, lives, BATCH):
        run_state_machine_as_test(
            seed(batch if repeat else randrange(2**32))(machine),
            settings=settings(
                max_examples=min(BATCH, lives - batch),
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
