"""What tests of GPU links share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tests.contracts.exchange_parties import PATIENCE_S


def eventually(holds: Callable[[], bool]) -> None:
    """What a thread aside brings about."""
    moment = threading.Event()
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, "it never comes"
        moment.wait(0.005)
