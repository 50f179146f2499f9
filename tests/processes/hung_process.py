"""Processes of a cluster in which something stops turning once the test says so."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

from cluster.events import Role
from cluster.scheduler_process import SchedulerProcess
from cluster.spec import ClusterSpec
from cluster.worker_process import WorkerProcess
from router.placement import Member, Placement


class Hole(Placement):
    """Whoever looks into it never returns."""

    def __getattribute__(self, name: str) -> object:
        threading.Event().wait()


def scheduler(pipe: Connection, spec: str) -> None:
    """Its loop hangs."""
    process = SchedulerProcess(ClusterSpec.from_json(spec), 1)
    process.start()
    pipe.recv_bytes()
    process._thread.loop.call_soon_threadsafe(threading.Event().wait)
    threading.Event().wait()


def worker(pipe: Connection, spec: str, role: str) -> None:
    """Of an attention worker the compute thread hangs."""
    process = WorkerProcess(ClusterSpec.from_json(spec), Role(role), Member(f"{role}-0", 1), "127.0.0.1")
    process.start()
    pipe.recv_bytes()
    process._service.publish(object.__new__(Hole))
    threading.Event().wait()
