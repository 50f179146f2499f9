"""Ends of an exchange in processes of their own, which are forked from one that has used no thread yet."""

from __future__ import annotations

import os
from dataclasses import replace
from multiprocessing.connection import Connection

from router.transport.base import Peer
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, answer, connect, gpu_of, identity, parcel


def expert_process(pipe: Connection, kind: str, behaviour: str) -> None:
    """Tell the address, then with each parcel: "answers" it, only "tells" of it, or tells and "pulses"."""
    end = expert_end(kind, identity("expert-0"), replace(CONFIG, combine_timeout_s=0.2), gpu=gpu_of(kind))
    pipe.send_bytes(end.address.encode())
    is_slow = False
    while os.getppid() != 1:
        received = end.receive(0.05 if is_slow else PATIENCE_S)
        if is_slow:
            end.pulse()
        if received is not None and behaviour == "answers":
            answer(end, received)
        elif received is not None:
            pipe.send_bytes(b"received")
            is_slow = behaviour == "pulses"


def attention_process(pipe: Connection, kind: str, address: str) -> None:
    """Link to the expert, dispatch one parcel, tell, then hold everything until killed."""
    me = identity()
    expert = identity("expert-0").member
    end = attention_end(kind, me, CONFIG, gpu=gpu_of(kind))
    connect(end, [Peer(expert, address)])
    end.dispatch([parcel(me, expert)])
    pipe.send_bytes(b"dispatched")
    pipe.poll(3 * PATIENCE_S)
