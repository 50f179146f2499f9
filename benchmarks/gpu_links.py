"""What one link costs and carries: round trip, bandwidth, device memory and SMs for each pair. No Ray.

    python benchmarks/gpu_links.py --kind cuda_ipc --device cuda
    NCCL_MULTI_RANK_GPU_ENABLE=1 python benchmarks/gpu_links.py --kind nccl --device cuda   # two ranks, one GPU
    python benchmarks/gpu_links.py --kind shm                                               # to compare with

The expert lives in a process of its own, on the next GPU if there is one. It answers with one row for each route,
computing nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from router.config import RouterConfig
from router.placement import EpochId, Member
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Peer, Reply
from router.transport.cuda import gpu_for
from router.transport.select import attention_end, expert_end

HIDDEN = 3072
CONFIG = RouterConfig(connect_timeout_s=60.0, link_bytes_max=64 << 20)
US, THEM = Member("attention-0", 1), Member("expert-0", 1)
_BEFORE_CUDA = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
_PRODUCTS, _WIDTH = 64, 8192  # of the matrix product that fills a GPU


def identity(member: Member) -> LinkIdentity:
    return LinkIdentity(member, "0" * 16, "", HIDDEN, torch.bfloat16)


def serve(pipe: Connection, kind: str, device: str) -> None:
    """The expert's process: answers, and stands still between "pause" and "go on"."""
    os.environ.update(_BEFORE_CUDA)
    where = torch.device(device, torch.cuda.device_count() - 1) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    end: ExpertEnd = expert_end(kind, identity(THEM), CONFIG, gpu=gpu_for(kind, where))
    pipe.send(end.address)
    while True:
        received = end.receive(0.01)
        if received is not None:
            end.reply(received, received.rows)
        elif pipe.poll():
            if pipe.recv() == "end":
                break
            pipe.recv()  # stands still until told
    end.close()


class Link:
    def __init__(self, end: AttentionEnd, device: torch.device) -> None:
        self._end, self._device, self._number = end, device, 0

    def parcel(self, rows: int) -> Parcel:
        self._number += 1
        content = torch.ones(rows, HIDDEN, dtype=torch.bfloat16, device=self._device)
        routes = torch.arange(rows, dtype=torch.int32)
        return Parcel(US, THEM, EpochId(1, 1), self._number, 0, content, routes, routes)

    def seconds(self, rows: int) -> float:
        """There and back."""
        sent = self.parcel(rows)
        _settle(self._device)
        began_s = time.perf_counter()
        ticket = self._end.dispatch([sent])
        [outcome] = self._end.combine(ticket, 10.0)
        _settle(self._device)
        took_s = time.perf_counter() - began_s
        assert isinstance(outcome, Reply), outcome
        self._end.release(ticket)
        return took_s

    def left_unread(self, rows: int) -> Any:
        return self._end.dispatch([self.parcel(rows)])

    def combine(self, ticket: Any) -> None:
        self._end.combine(ticket, 10.0)
        self._end.release(ticket)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(kind: str, device: torch.device, repeats: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    expert = context.Process(target=serve, args=(theirs, kind, device.type))
    expert.start()
    try:
        assert pipe.poll(120), "the expert does not listen"
        end = attention_end(kind, identity(US), CONFIG, gpu=gpu_for(kind, device))
        address = pipe.recv()
        free_bytes = _free(device)
        failed = end.adopt(end.prepare([Peer(THEM, address)], 60.0))
        assert not failed, failed
        link = Link(end, end.device)
        link.seconds(8)
        found = {"kind": end.transports()[THEM], "pair_bytes": free_bytes - _free(device)}
        found |= _times(link, repeats)
        if end.device.type == "cuda":
            found["sms_waiting"] = _sms_taken(link, pipe, device)
        pipe.send("end")
        end.close()
        expert.join(30)
        return found
    finally:
        expert.kill()
        expert.join()


def _times(link: Link, repeats: int) -> dict[str, float]:
    few = sorted(link.seconds(8) for _ in range(repeats))
    many = statistics.median(link.seconds(1024) for _ in range(max(10, repeats // 20)))
    return {
        "round_trip_p50_us": 1e6 * few[len(few) // 2],
        "round_trip_p99_us": 1e6 * few[len(few) * 99 // 100],
        "gigabytes_per_s_both_ways": 2 * 1024 * HIDDEN * 2 / many / 1e9,
    }


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _sms_taken(link: Link, pipe: Connection, device: torch.device) -> float:
    """How many SMs a send occupies while its peer does not receive: the share by which other work is slower."""
    alone_s = _product_s(device)
    pipe.send("pause")
    time.sleep(0.1)
    ticket = link.left_unread(1024)
    beside_s = _product_s(device)
    pipe.send("go on")
    link.combine(ticket)
    return (1 - alone_s / beside_s) * torch.cuda.get_device_properties(device).multi_processor_count


def _product_s(device: torch.device) -> float:
    """Waits for its own stream alone: a send that waits is none of it."""
    square = torch.ones(_WIDTH, _WIDTH, dtype=torch.bfloat16, device=device)
    out = torch.mm(square, square)
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    began_s = time.perf_counter()
    for _ in range(_PRODUCTS):
        torch.mm(square, square, out=out)
    stream.synchronize()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("shm", "grpc", "cuda_ipc", "nccl", "auto"), default="shm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ.update(_BEFORE_CUDA)
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device(asked.device)
    torch.set_num_threads(1)
    found = measure(asked.kind, device, asked.repeats)
    print(json.dumps(found) if asked.json else "\n".join(f"{name:28} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
