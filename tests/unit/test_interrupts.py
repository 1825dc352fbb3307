import os
import signal
import threading

import pytest

from fedtl.errors import Interrupted
from fedtl.interrupts import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_a_safe_place(number: int, code: int) -> None:
    with Interrupts() as interrupts:
        interrupts.check("never raised")
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="saved round 2") as stopped:
            interrupts.check("saved round 2", "Type this")
    assert stopped.value.exit_code == code
    assert stopped.value.do == "Type this"


def test_the_second_signal_stops_at_once_and_says_how_to_go_on() -> None:
    with Interrupts() as interrupts:
        interrupts.hint = "Type 'fedtl resume here' to go on"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="fedtl resume here") as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_nothing_is_caught_and_nothing_breaks() -> None:
    seen = []

    def work() -> None:
        with Interrupts() as interrupts:
            interrupts.check()
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
