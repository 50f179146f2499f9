"""Exchanges between processes: what death, silence and refusal look like when they are real."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from router.transport.base import Peer, Refusal, RefusalReason, Reply
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_link_suite import assert_nothing_left, footprint
from tests.contracts.exchange_parties import (
    CONFIG,
    PATIENCE_S,
    answer,
    computed,
    connect,
    gpu_of,
    identity,
    parcel,
)
from tests.contracts.exchange_process import attention_process, expert_process

KINDS = ("shm", "grpc", "auto", "nccl", "cuda_ipc")


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", expert_process.__module__])  # torch once, and not in each


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process of its own and our end of its pipe; it is killed at the latest when left."""
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=target, args=(theirs, *args))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(PATIENCE_S)
        child.close()
        ours.close()


def told(pipe: Connection) -> str:
    assert pipe.poll(3 * PATIENCE_S), "the process says nothing"
    return pipe.recv_bytes().decode()


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    """Where ends listened; afterwards nothing is left: no descriptor, thread or mapping here, no such name."""
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    before = footprint()
    used: list[str] = []
    yield used
    assert_nothing_left(before)
    assert used
    with open("/proc/net/unix") as sockets:
        names = sockets.read()
    for address in ",".join(used).split(","):
        assert address.split("unix-abstract:")[-1] not in names


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_process_killed_mid_wait_is_noticed_at_once(kind: str, addresses: list[str]) -> None:
    """kill -9 costs a replan, not the hang deadline."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, kind, "tells") as (child, pipe):
        addresses.append(told(pipe))
        end = attention_end(kind, me, CONFIG, gpu=gpu_of(kind))
        assert connect(end, [Peer(expert, addresses[0])]) == {}
        ticket = end.dispatch([parcel(me, expert)])
        assert told(pipe) == "received"
        started_s = time.monotonic()
        os.kill(child.pid or 0, signal.SIGKILL)
        [outcome] = end.combine(ticket, PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S / 2
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        end.close()


@pytest.mark.parametrize("kind", KINDS)
def test_exchanges_between_processes(kind: str, addresses: list[str]) -> None:
    """The same rows as in one process, from a life that is not ours."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, kind, "answers") as (_, pipe):
        addresses.append(told(pipe))
        end = attention_end(kind, me, CONFIG, gpu=gpu_of(kind))
        assert connect(end, [Peer(expert, addresses[0])]) == {}
        for number in range(50):
            sent = parcel(me, expert, number, rows=number % 9, layer=number)
            ticket = end.dispatch([sent])
            [reply] = end.combine(ticket, PATIENCE_S)
            assert isinstance(reply, Reply)
            assert torch.equal(reply.rows, computed(sent))
            del reply
            end.release(ticket)
        end.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_process_killed_leaves_nothing_at_the_expert(kind: str, addresses: list[str]) -> None:
    """Its link is dropped; its parcel, answered late, bothers nobody."""
    end = expert_end(kind, identity("expert-0"), CONFIG, gpu=gpu_of(kind))
    addresses.append(end.address)
    alone = footprint()
    with process(attention_process, kind, end.address) as (child, pipe):
        received = end.receive(3 * PATIENCE_S)
        assert received is not None
        assert told(pipe) == "dispatched"
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PATIENCE_S)
    assert end.receive(0.0) is None
    answer(end, received)
    del received
    if kind in ("shm", "cuda_ipc"):  # gRPC keeps an idle thread for the next caller, until the end closes
        assert footprint() == alone
    end.close()


@pytest.mark.parametrize("kind", ["shm", "grpc", "nccl"])
def test_a_frozen_expert_process_is_found_by_its_silence(kind: str, addresses: list[str]) -> None:
    """SIGSTOP leaves every socket open; what pulses while it works falls silent."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, kind, "pulses") as (child, pipe):
        addresses.append(told(pipe))
        end = attention_end(kind, me, CONFIG, gpu=gpu_of(kind))
        assert connect(end, [Peer(expert, addresses[0])]) == {}
        ticket = end.dispatch([parcel(me, expert)])
        assert told(pipe) == "received"
        began_s = time.monotonic()
        frozen = threading.Timer(1.0, os.kill, (child.pid or 0, signal.SIGSTOP))
        frozen.start()
        [outcome] = end.combine(ticket, 0.6)
        frozen.join()
        assert time.monotonic() - began_s >= 1.5
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.DEADLINE
        assert "0.6 s" in outcome.detail
        end.close()


def test_an_idle_link_to_a_frozen_host_is_noticed(addresses: list[str]) -> None:
    """Nothing is in flight that could be late: only the keepalive finds a partition, within twice its time."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, "grpc", "answers") as (child, pipe):
        addresses.append(told(pipe))
        end = attention_end("grpc", me, replace(CONFIG, keepalive_s=0.3))
        assert connect(end, [Peer(expert, addresses[0])]) == {}
        os.kill(child.pid or 0, signal.SIGSTOP)
        ticket = end.dispatch([parcel(me, expert)])
        [outcome] = end.combine(ticket, PATIENCE_S)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        end.close()
