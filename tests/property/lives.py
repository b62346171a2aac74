"""How long a state machine of the property tests lives, and how often."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_lives(
    machine: Callable[[], RuleBasedStateMachine], lives: int, *, repeat: bool = True
) -> None:
    """Run it so many times, at most 40 steps each.

    Args:
        machine: makes one.
        lives: how many.
        repeat: the same ones each time; others otherwise.

    Raises:
        Exception: what the shortest life raises that breaks an invariant.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=lives,
            stateful_step_count=40,
            deadline=None,
            derandomize=repeat,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
