"""What holding answers to a JSON schema costs a step: plain and held batches in turn, on one worker.

    python -m benchmarks.grammars CHECKPOINT --batch 16 --rounds 6

An attention worker in this process and an expert worker over shm, one compute thread each, exact mode. CPU time is
of the attention side, the threads of grammars included: on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from attention_workers.attention_model import AttentionModel
from attention_workers.book import Book
from attention_workers.guides import Guides
from attention_workers.kv_blocks import KvBlocks
from attention_workers.step import AttemptId, Grammar, Plan, Sampling, Start, StepResult
from attention_workers.worker import AttentionWorker
from benchmarks.joining import EPOCH, expert_process, identity, routing
from benchmarks.spawned import spawned
from gateway import grammar
from gateway.model_card import read_model_card
from model.attention import TILE
from model.checkpoint import Checkpoint
from model.device import HOST
from model.layer_types import FULL
from router.dispatcher import Dispatcher
from router.placement import Member, spread
from router.transport.select import attention_end

MODEL_LEN, TOKENS = 512, 96
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 40},
        "count": {"type": "integer", "minimum": 0, "maximum": 99_999},
        "ok": {"type": "boolean"},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "count", "ok", "colour"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 100}
"""Longer than any answer here, so that held and plain batches have the same rows."""


def measure(path: Path, batch: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    card = read_model_card(
        path, name="bench", fingerprint=checkpoint.fingerprint, vocab_size=config.vocab_size, context=MODEL_LEN
    )
    part = grammar.Part("schema", {"json_schema": grammar.with_options(SCHEMA, "schema")})
    held = Grammar(grammar.whole([part], after_thought=False), tuple(sorted(card.eos)))
    guides = Guides(path / "tokenizer.json", config.vocab_size, lambda: None)
    seen: dict[str, list[tuple[float, float, float]]] = {"plain": [], "half held": [], "held": []}
    with spawned("expert 0", expert_process, path, 0) as expert:
        members = [(Member("e0", 1), expert.hear(120.0))]
        placement = spread(EPOCH, checkpoint.fingerprint, members, config.num_layers, config.num_experts, 1)
        expert.tell(placement)
        expert.hear(120.0)
        worker = _worker(checkpoint, batch, guides)
        worker.dispatcher.prepare(placement)
        worker.dispatcher.adopt()
        for number in range((rounds + 1) * len(seen)):
            kind = list(seen)[number % len(seen)]
            count = {"plain": 0, "half held": batch // 2, "held": batch}[kind]
            found = _turn(worker, number + 1, [held] * count + [None] * (batch - count))
            if number >= len(seen):  # the first of each is for warming up
                seen[kind].append(found)
        worker.dispatcher.close()
    guides.close(10)
    return [_summary(kind, batch, found) for kind, found in seen.items()]


def _worker(checkpoint: Checkpoint, batch: int, guides: Guides) -> AttentionWorker:
    dtype = getattr(torch, checkpoint.config.dtype)
    model = AttentionModel(
        checkpoint, device=HOST, dtype=dtype, numerics="exact", positions_max=MODEL_LEN, progress=lambda *_: None
    )
    blocks = batch * MODEL_LEN // TILE
    model.make_kv({FULL: blocks})
    book = Book(
        checkpoint.fingerprint,
        1,
        KvBlocks(blocks),
        TILE,
        batch,
        MODEL_LEN,
        prefix_cache=False,
        guide_of=guides.open,
    )
    member, router = Member("a0", 1), routing(checkpoint)
    end = attention_end("shm", identity(checkpoint, member), router)
    return AttentionWorker(model, book, Dispatcher(end, member, router, lambda _: None), 1)


def _turn(worker: AttentionWorker, plan: int, grammars: list[Grammar | None]) -> tuple[float, float, float]:
    """Milliseconds of a step: its median, its longest, and of CPU."""
    starts = [
        Start(
            AttemptId(f"{plan}.{i}", 0, 1), "gw", (5 + i, 7, 9), (), Sampling(seed=1000 * plan + i), frozenset(),
            TOKENS, None, grammar=one,
        )
        for i, one in enumerate(grammars)
    ]  # fmt: skip
    worker.book.apply(Plan(1, plan, worker.book.fingerprint, 1, tuple(starts)), StepResult())
    while not all(s.num_generated for s in worker.book.sequences.values()):
        worker.step(StepResult())
    steps_s, cpu_s = [], time.process_time()
    while len(worker.book.sequences) == len(grammars):
        began_s = time.perf_counter()
        worker.step(StepResult())
        steps_s.append(time.perf_counter() - began_s)
    cpu_s = (time.process_time() - cpu_s) / len(steps_s)
    while worker.book.sequences:
        worker.step(StepResult())
    return 1e3 * statistics.median(steps_s), 1e3 * max(steps_s), 1e3 * cpu_s


def _summary(kind: str, batch: int, found: list[tuple[float, float, float]]) -> dict[str, Any]:
    medians, longest, cpu = zip(*found, strict=True)
    return {
        "answers": kind, "batch": batch, "step_ms": round(statistics.median(medians), 2),
        "step_ms_least": round(min(medians), 2), "longest_step_ms": round(statistics.median(longest), 2),
        "cpu_ms_per_step": round(statistics.median(cpu), 2), "cpu_ms_per_step_least": round(min(cpu), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    for row in measure(args.checkpoint, args.batch, args.rounds):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
