"""Native calls that may never return, each on a thread of its own, so that nobody who must go on waits for one.

NCCL's joining and aborting cannot be interrupted through cupy. Their threads are daemons: one that hangs holds its
pair's place under `gpu_pairs_max`, so that there are never more of them, and ends with the process, which the
controller kills by pid when it is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Aside:
    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def start(self, call: Callable[[], None], name: str) -> None:
        """`call` raises nothing that it does not handle."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=call, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait so long for all of them together; those that hang are named. Idempotent."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                _log.error("%s hangs in a native call, and ends with this process", thread.name)
        self._threads.clear()
