"""The life of a worker as the controller sees it: a table from (state, event) to state.

A missing pair is a mistake in the controller: it raises and changes nothing.

    WAITING ──order──▶ STARTING ──register──▶ LOADING ──ready──▶ READY
       ▲                  │ lost                 │ lost            │ lost
       └──────────────────┴──────────────────────┴─────────────────┘
    leave leads from LOADING and READY to LEAVING, where a worker that is not wanted any more ends.
    give_up leads from anywhere to FAILED, from where try_again leads back to WAITING; stop leads to STOPPED.
"""

from __future__ import annotations

import enum


class WorkerState(enum.StrEnum):
    WAITING = "waiting"  # to be started, now or when its back-off has passed
    STARTING = "starting"  # its process is ordered and has not registered yet
    LOADING = "loading"  # registered; reads weights or connects
    READY = "ready"
    FAILED = "failed"  # not started again while the cluster has not served: its detail says why
    LEAVING = "leaving"  # nobody needs it any more: told to exit, forgotten once it has
    STOPPED = "stopped"  # ordered to exit with the cluster


class Change(enum.StrEnum):
    ORDER = "order"
    REGISTER = "register"
    READY = "ready"
    LOST = "lost"
    GIVE_UP = "give_up"
    TRY_AGAIN = "try_again"
    LEAVE = "leave"
    STOP = "stop"


_S, _C = WorkerState, Change

TRANSITIONS: dict[tuple[WorkerState, Change], WorkerState] = {
    (_S.WAITING, _C.ORDER): _S.STARTING,
    (_S.STARTING, _C.REGISTER): _S.LOADING,
    (_S.LOADING, _C.REGISTER): _S.LOADING,  # its stream broke and it came back
    (_S.READY, _C.REGISTER): _S.LOADING,
    (_S.LOADING, _C.READY): _S.READY,
    (_S.READY, _C.READY): _S.READY,
    (_S.STARTING, _C.LOST): _S.WAITING,
    (_S.LOADING, _C.LOST): _S.WAITING,
    (_S.READY, _C.LOST): _S.WAITING,
    (_S.STARTING, _C.GIVE_UP): _S.FAILED,
    (_S.LOADING, _C.GIVE_UP): _S.FAILED,
    (_S.READY, _C.GIVE_UP): _S.FAILED,
    (_S.FAILED, _C.TRY_AGAIN): _S.WAITING,
    (_S.LOADING, _C.LEAVE): _S.LEAVING,
    (_S.READY, _C.LEAVE): _S.LEAVING,
    (_S.LEAVING, _C.REGISTER): _S.LEAVING,
    **{(state, _C.STOP): _S.STOPPED for state in _S if state is not _S.FAILED},
    (_S.FAILED, _C.STOP): _S.FAILED,
}

LIVE = frozenset({WorkerState.LOADING, WorkerState.READY})


class IllegalChange(Exception):
    """The controller asked for a change that a worker in this state cannot make."""


def after(state: WorkerState, change: Change) -> WorkerState:
    """The state that follows. Raises IllegalChange, naming both, when there is none."""
    try:
        return TRANSITIONS[state, change]
    except KeyError:
        raise IllegalChange(f"a worker that is {state.value} cannot {change.value}") from None
