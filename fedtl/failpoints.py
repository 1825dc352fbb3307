"""Named places where a test can make the process die, to prove that nothing is lost there."""

from __future__ import annotations

import os
import signal

VARIABLE = "FEDTL_FAIL"


def failpoint(name: str, round: int) -> None:
    """Die here if the environment says so.

    ``FEDTL_FAIL=after_aggregate:kill`` kills at the first passage, ``...:kill:3`` in round 3;
    ``interrupt`` and ``terminate`` send SIGINT and SIGTERM instead of SIGKILL.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    place, _, action = wanted.partition(":")
    how, _, at = action.partition(":")
    if place == name and (not at or int(at) == round):
        signals = {
            "kill": signal.SIGKILL,
            "interrupt": signal.SIGINT,
            "terminate": signal.SIGTERM,
        }
        os.kill(os.getpid(), signals[how])
