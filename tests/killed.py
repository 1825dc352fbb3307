"""A failpoint that ends a call instead of the process, for time: nothing in fedtl catches it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fedtl import failpoints


class _Killed(BaseException):
    """The process would be dead now."""


@contextmanager
def killed_at(point: str) -> Iterator[None]:
    """What runs within must come to this failpoint (as ``FEDTL_FAIL`` names it), and ends there."""

    def kill(process: int, number: int) -> NoReturn:
        raise _Killed

    system = SimpleNamespace(environ=os.environ, getpid=os.getpid, kill=kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "os", system)
        patch.setenv(failpoints.VARIABLE, point)
        with pytest.raises(_Killed):
            yield
