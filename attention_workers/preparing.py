"""Handshakes for the next placement, in a thread of their own: a peer that does not answer holds up no step.

Only the newest placement counts: one that waits is replaced, one that is being prepared is overtaken. Waits are
bounded by the exchange's `connect_timeout_s`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from router.placement import Placement


class Preparing:
    def __init__(
        self,
        prepare: Callable[[Placement], None],
        on_prepared: Callable[[], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """`prepare` may wait; the others are called on the thread and must not."""
        self._prepare, self._on_prepared, self._on_failure = prepare, on_prepared, on_failure
        self._changed = threading.Condition()  # guards what follows
        self._next: Placement | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="attention-preparing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, placement: Placement) -> None:
        """Prepare this one next, instead of any that waits. From any thread, also before `start`."""
        with self._changed:
            self._next = placement
            self._changed.notify()

    def close(self, grace_s: float) -> None:
        """Ends after the handshakes in hand. Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(grace_s)

    def _run(self) -> None:
        try:
            while (placement := self._take()) is not None:
                self._prepare(placement)
                self._on_prepared()
        except Exception as error:
            # The thread's one net: a worker that cannot follow placements must be seen as failed and replaced.
            self._on_failure(f"placement: {type(error).__name__}: {error}")

    def _take(self) -> Placement | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._next is not None)
            placement, self._next = self._next, None
            return None if self._is_closing else placement
