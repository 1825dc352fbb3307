"""Named places where a test can make the process die, to prove that nothing is lost there."""

from __future__ import annotations

import os
import signal

VARIABLE = "FEDTL_FAIL"


def failpoint(name: str, round: int) -> None:
    """Die here if the environment says so.

    ``FEDTL_FAIL=after_aggregate:kill`` kills at the first passage, ``...:kill:3`` in round 3;
    ``interrupt`` and ``terminate`` send SIGINT and SIGTERM, ``stop`` SIGSTOP instead of SIGKILL.
    ``...:once=PATH`` at the end: only the process that can make the file PATH dies, so that what
    is tried again by another process succeeds.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    wanted, _, marker = wanted.partition(":once=")
    place, _, action = wanted.partition(":")
    how, _, at = action.partition(":")
    if place != name or (at and int(at) != round):
        return
    if marker:
        try:
            open(marker, "x").close()
        except FileExistsError:
            return
    os.kill(os.getpid(), SIGNALS[how])


SIGNALS = {
    "kill": signal.SIGKILL,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
    "stop": signal.SIGSTOP,
}
