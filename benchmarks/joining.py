"""Does it pay to hold a parcel for another attention worker's? Tokens/s by `join_wait_s`, in turn on one cluster.

    python -m benchmarks.joining CHECKPOINT --experts 1 --batch 8 --waits 0 0.001 0.003 --rounds 5

Two attention workers with half of the batch each, expert workers over shm, a process and one thread each, exact
mode, steps of decode only. The waits take turns so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from attention_workers.attention_model import AttentionModel
from attention_workers.book import Book
from attention_workers.kv_blocks import KvBlocks
from attention_workers.step import AttemptId, Plan, Sampling, Start, StepResult
from attention_workers.worker import AttentionWorker
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.worker import ExpertWorker
from model.attention import TILE
from model.checkpoint import Checkpoint
from model.device import HOST
from model.layer_types import FULL
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.placement import EpochId, Member, Placement, spread
from router.transport.base import LinkIdentity
from router.transport.select import attention_end, expert_end

PROMPT_TOKENS, MODEL_LEN = 64, 2048
EPOCH = EpochId(1, 1)


def identity(checkpoint: Checkpoint, member: Member) -> LinkIdentity:
    dtype = getattr(torch, checkpoint.config.dtype)
    return LinkIdentity(member, checkpoint.fingerprint, "bench", checkpoint.config.hidden_size, dtype)


def routing(checkpoint: Checkpoint) -> RouterConfig:
    config = checkpoint.config
    element = getattr(torch, config.dtype).itemsize
    return RouterConfig(combine_timeout_s=30.0).fitted(config.experts_per_token, config.hidden_size, element)


def expert_process(pipe: Connection, path: Path, index: int) -> None:
    """Tells its address, takes a placement, then answers; each wait that it is sent is used from then on, and
    answered with what was computed since the last."""
    torch.set_num_threads(1)
    checkpoint, member = Checkpoint.open(path), Member(f"e{index}", 1)
    dtype = getattr(torch, checkpoint.config.dtype)
    end = expert_end("shm", identity(checkpoint, member), routing(checkpoint))
    pipe.send(end.address)
    residency = Residency(checkpoint, member, dtype, "exact", HOST)
    residency.prepare(pipe.recv())
    worker = ExpertWorker(residency, end, ExpertConfig())
    threading.Thread(target=_answer, args=(worker,), daemon=True).start()
    pipe.send("ready")
    while (wait_s := pipe.recv()) is not None:
        before = worker.batches, worker.parcels, worker.held_s, time.process_time()
        worker.batcher.join_wait_s = wait_s
        pipe.send(before)


def _answer(worker: ExpertWorker) -> None:
    torch.set_num_threads(1)
    while os.getppid() != 1:
        worker.turn(0.5)


def attention_process(pipe: Connection, path: Path, index: int, placement: Placement, batch: int) -> None:
    """Computes all prompts, then for each number of steps that it is sent tells how long they took."""
    torch.set_num_threads(1)
    checkpoint, member = Checkpoint.open(path), Member(f"a{index}", 1)
    dtype = getattr(torch, checkpoint.config.dtype)
    model = AttentionModel(
        checkpoint, device=HOST, dtype=dtype, numerics="exact", positions_max=MODEL_LEN, progress=lambda *_: None
    )
    blocks = batch * MODEL_LEN // TILE
    model.make_kv({FULL: blocks})
    book = Book(checkpoint.fingerprint, 1, KvBlocks(blocks), TILE, batch, MODEL_LEN)
    router = routing(checkpoint)
    end = attention_end("shm", identity(checkpoint, member), router)
    dispatcher = Dispatcher(end, member, router, lambda _: None)
    dispatcher.prepare(placement)
    dispatcher.adopt()
    worker = AttentionWorker(model, book, dispatcher, 1)
    book.apply(Plan(1, 1, checkpoint.fingerprint, 1, tuple(_starts(index, batch))), StepResult())
    while not all(s.is_prompt_done for s in book.sequences.values()):
        worker.step(StepResult())
    pipe.send("ready")
    while (stop_s := pipe.recv()) is not None:
        tokens, started_s, used_s = worker.tokens, time.monotonic(), time.process_time()
        while time.monotonic() < started_s + stop_s:
            worker.step(StepResult())
        tokens = worker.tokens - tokens
        pipe.send((tokens, tokens / (time.monotonic() - started_s), time.process_time() - used_s))
    dispatcher.close()


def _starts(index: int, batch: int) -> list[Start]:
    sampling = Sampling(temperature=1.0, seed=index)
    return [
        Start(
            AttemptId(f"{index}.{i}", 0, 1), "gw", tuple(range(100 + i, 100 + i + PROMPT_TOKENS)), (), sampling,
            frozenset(), MODEL_LEN, None,
        )
        for i in range(batch)
    ]  # fmt: skip


def measure(
    path: Path, experts: int, batch: int, waits: list[float], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    checkpoint = Checkpoint.open(path)

    def spawn(target: Callable[..., None], *args: Any) -> Connection:
        mine, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, path, *args), daemon=True)
        process.start()
        return mine

    expert_pipes = [spawn(expert_process, i) for i in range(experts)]
    members = [(Member(f"e{i}", 1), pipe.recv()) for i, pipe in enumerate(expert_pipes)]
    config = checkpoint.config
    placement = spread(EPOCH, checkpoint.fingerprint, members, config.num_layers, config.num_experts, 1)
    for pipe in expert_pipes:
        pipe.send(placement)
    assert [pipe.recv() for pipe in expert_pipes] == ["ready"] * experts
    attention_pipes = [spawn(attention_process, i, placement, batch // 2) for i in range(2)]
    assert [pipe.recv() for pipe in attention_pipes] == ["ready"] * 2
    seen: dict[float, list[tuple[float, ...]]] = {wait_s: [] for wait_s in waits}
    for turn in range(rounds * len(waits)):
        wait_s = waits[turn % len(waits)]
        before = _ask(expert_pipes, wait_s)
        tokens, speeds, attention_s = (sum(each) for each in zip(*_ask(attention_pipes, seconds), strict=True))
        after = _ask(expert_pipes, wait_s)
        batches, parcels, held_s, expert_s = (
            sum(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in range(4)
        )
        used_s = attention_s + expert_s
        seen[wait_s].append((speeds, 1e3 * used_s / tokens, parcels / batches, 1e3 * held_s / batches))
    for pipe in (*attention_pipes, *expert_pipes):
        pipe.send(None)
    return [_summary(experts, batch, wait_s, found) for wait_s, found in seen.items()]


def _ask(pipes: list[Connection], question: Any) -> list[Any]:
    for pipe in pipes:
        pipe.send(question)
    return [pipe.recv() for pipe in pipes]


def _summary(experts: int, batch: int, wait_s: float, found: list[tuple[float, ...]]) -> dict[str, Any]:
    speeds, cpu_ms, joined, held_ms = zip(*found, strict=True)
    return {
        "experts": experts, "batch": batch, "join_wait_ms": 1e3 * wait_s,
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "cpu_ms_per_token": round(statistics.median(cpu_ms), 2),
        "parcels_per_batch": round(statistics.median(joined), 2),
        "held_ms_per_batch": round(statistics.median(held_ms), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--experts", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="of both attention workers together")
    parser.add_argument("--waits", type=float, nargs="+", default=[0.0, 0.001, 0.003], help="join_wait_s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    for row in measure(args.checkpoint, args.experts, args.batch, args.waits, args.rounds, args.seconds):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
