"""One topology served: a thread for each attention worker, which orders, steps, stops and hands over as told."""

from __future__ import annotations

import dataclasses
import queue
import random
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field

import torch

from attention_workers.step import AttemptId, Start, StepResult, TokenDelta
from router.placement import EpochId, spread
from tests.equivalence.grand_story import GATEWAY, Arrival, Topology, arrivals, limits, random_placement
from tests.equivalence.local_cluster import EPOCH, LocalCluster

PATIENCE_S = 120
NEXT_EPOCH = EpochId(EPOCH.term, EPOCH.number + 1)


@dataclass
class Answer:
    """Tokens, and for each the bits of its logprobs: its own, then of the likeliest with their ids."""

    tokens: list[int] = field(default_factory=list)
    bits: list[bytes] = field(default_factory=list)

    def add(self, delta: TokenDelta) -> None:
        assert delta.position == len(self.tokens), (
            f"{delta.attempt}: position {delta.position} after {self.tokens}"
        )
        assert not delta.detail, f"{delta.attempt}: {delta.detail}"
        self.tokens += delta.tokens
        for logprobs in delta.logprobs:
            ids, values = zip((0, logprobs.sampled), *logprobs.top, strict=True)
            self.bits.append(struct.pack(f"<{len(ids)}i{len(ids)}f", *ids, *values))

    @property
    def num_values(self) -> int:
        return sum(len(bits) // 8 for bits in self.bits)


class Run:
    """`answers` by (request, index), once `serve` has returned; `seen` counts what happened."""

    def __init__(self, topo: Topology, checkpoint, dtype) -> None:
        self.topo, self.checkpoint, self.dtype = topo, checkpoint, dtype
        self.answers: dict[tuple[str, int], Answer] = {}
        self.seen: Counter[str] = Counter()
        self._arrivals = arrivals(topo)
        self._fates = {a.start.attempt: a for a in self._arrivals if a.stops_after is not None}
        self._left = len(self._arrivals)
        self._changing = threading.Lock()  # of `_left`, `_errors`, `seen` and how many have adopted
        self._inboxes: list[queue.SimpleQueue[Start | None]] = [queue.SimpleQueue() for _ in range(topo.attention)]
        self._errors: list[BaseException] = []
        self._adopted = 0
        self._next_placement = None

    def serve(self) -> None:
        topo, before = self.topo, torch.get_num_threads()
        rng = random.Random(f"placements {topo.seed}")

        def at_random(members, replicas):
            config = self.checkpoint.config
            even = spread(EPOCH, self.checkpoint.fingerprint, members, config.num_layers, config.num_experts, 1)
            return random_placement(rng, even, EPOCH, replicas)

        torch.set_num_threads(topo.threads)
        try:
            with LocalCluster(
                self.checkpoint, attention=topo.attention, experts=topo.experts, microbatches=topo.microbatches,
                blocks=topo.blocks, sliding_blocks=topo.sliding_blocks, dtype=self.dtype, keep=topo.keep,
                transport=topo.transport, join_wait_s=topo.join_wait_s, dies_after=topo.dies_after,
                placement=at_random, replicas=topo.replicas_min, prefix_cache=topo.prefix_cache,
            ) as cluster:  # fmt: skip
                if topo.moves_at is not None:
                    moved = random_placement(rng, cluster.placement, NEXT_EPOCH, topo.replicas_min)
                    cluster.prepare(moved)
                    self._next_placement = moved
                self._step_all(cluster)
                self._count(cluster)
        finally:
            torch.set_num_threads(before)

    def _step_all(self, cluster: LocalCluster) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(cluster, w), name=f"a{w}")
            for w in range(self.topo.attention)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), f"{thread.name} still runs"
        if self._errors:
            raise self._errors[0]
        assert self._left == 0

    def _guarded(self, cluster: LocalCluster, worker: int) -> None:
        try:
            torch.set_num_threads(self.topo.threads)
            _Driver(self, cluster, worker).run()
        except BaseException as error:
            self._errors.append(error)  # raised again by who joins
            self.end_all()

    def end_all(self) -> None:
        for inbox in self._inboxes:
            inbox.put(None)

    def _count(self, cluster: LocalCluster) -> None:
        for worker in cluster.workers:
            self.seen["lost"] += worker.dispatcher.counters().get("lost", 0)
            self.seen["replans"] += worker.dispatcher.counters().get("replans", 0)
            self.seen["steps"] += worker.steps
            self.seen["prefix hits"] += worker.book.prefixes.num_hits
            self.seen["tokens found cached"] += worker.book.prefixes.num_hit_tokens
        for expert in cluster.experts:
            self.seen["batches"] += expert.batches
            self.seen["joined"] += expert.parcels - expert.batches


class _Driver:
    """One attention worker's thread."""

    def __init__(self, run: Run, cluster: LocalCluster, worker: int) -> None:
        self._run, self._cluster, self._index = run, cluster, worker
        self._worker, self._inbox = cluster.workers[worker], run._inboxes[worker]
        self._rng = random.Random(f"worker {worker} of {run.topo.seed}")
        self._coming = sorted((a for a in run._arrivals if a.worker == worker), key=lambda a: -a.step)
        self._handed: list[Start] = []
        self._stops: list[AttemptId] = []
        self._step = -9
        self._has_moved = run.topo.moves_at is None

    def run(self) -> None:
        while True:
            starts = self._due()
            self._order(starts or [])  # every step: each cuts prompts in another way
            if starts is None:
                return
            self._adopt_when_due()
            self._worker.step(result := StepResult())
            self._worker.book.check()
            self._take(result)
            self._step += 1

    def _due(self) -> list[Start] | None:
        """What starts now; waits when nothing runs and nothing is to come. None: all is done, everywhere."""
        is_idle = not (self._worker.book.sequences or self._stops)
        if is_idle and self._coming:
            self._step = max(self._step, self._coming[-1].step)
        found = []
        while self._coming and self._coming[-1].step <= self._step:
            found.append(self._coming.pop().start)
        is_idle = is_idle and not found
        while is_idle or not self._inbox.empty():
            handed = self._inbox.get(timeout=PATIENCE_S)
            if handed is None:
                return None
            found.append(handed)
            is_idle = False
        return found

    def _order(self, starts: list[Start]) -> None:
        stops, self._stops = self._stops, []
        self._take(self._cluster.order(self._index, starts, stops, **limits(self._rng)))

    def _adopt_when_due(self) -> None:
        if self._has_moved or self._step < self._run.topo.moves_at:
            return
        self._has_moved = True
        self._worker.dispatcher.prepare(self._run._next_placement)
        self._worker.dispatcher.adopt()
        with self._run._changing:
            self._run._adopted += 1
            everybody = self._run._adopted == self._run.topo.attention
            self._run.seen["placements adopted"] += 1
        if everybody:
            self._cluster.retire(EPOCH)

    def _take(self, result: StepResult) -> None:
        run, ended = self._run, 0
        for delta in result.deltas.get(GATEWAY, []):
            key = (delta.attempt.request_id, delta.attempt.index)
            answer = run.answers.setdefault(key, Answer())
            answer.add(delta)
            fate = run._fates.get(delta.attempt)
            if delta.finish is not None:
                ended += 1
            elif fate is not None and len(answer.tokens) > fate.stops_after:
                del run._fates[delta.attempt]
                ended += self._stop(fate, answer)
        with run._changing:
            run.seen["paused"] += len(result.paused)
            run._left -= ended
            is_last = ended and run._left == 0
        if is_last:
            run.end_all()

    def _stop(self, fate: Arrival, answer: Answer) -> int:
        """1: it ends here. 0: another attempt goes on from the tokens that are out."""
        self._stops.append(fate.start.attempt)
        with self._run._changing:
            self._run.seen["cancelled" if fate.resumes_on is None else "resumed"] += 1
        if fate.resumes_on is None:
            return 1
        attempt = dataclasses.replace(fate.start.attempt, number=2)
        resumed = dataclasses.replace(fate.start, attempt=attempt, accepted=tuple(answer.tokens))
        self._run._inboxes[fate.resumes_on].put(resumed)
        return 0
