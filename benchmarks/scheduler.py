"""What one round of the central scheduler costs, decoding and encoding included, on one core.

A round here is what the shell does between two sleeps: reports come off the wire, go through the core, and plans
are made and encoded. Times are the processor's, so that neighbours do not count. Three rounds are timed over a
growing number of running sequences: every sequence ends (`ending`), every prompt ends (`prompts`), each with a
plan for every worker, and neither (`undisturbed`), whose bytes, of reports and plans, must not grow.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.v1 import identity_pb2, schedule_pb2, step_pb2

from cluster.scheduler import wire
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.events import GatewayJoined, Incarnation, MembersExpected, SendPlan, Tick

FINGERPRINT = "bench"
GATEWAY = Incarnation("gateway-0", 1)
TARGET_MS = 25.0
TARGET_SEQUENCES = 10_000


@dataclass(frozen=True)
class Point:
    """Times in milliseconds of one core, the median of all repeats; bytes both ways."""

    sequences: int
    workers: int
    ending_ms: float
    prompts_ms: float
    undisturbed_ms: float
    undisturbed_bytes: int

    @property
    def worst_ms(self) -> float:
        return max(self.ending_ms, self.prompts_ms, self.undisturbed_ms)


class Bench:
    """A scheduler with `num_workers` workers that run `num_sequences`, all of them admitted and placed."""

    def __init__(self, num_sequences: int, num_workers: int, prompt_tokens: int) -> None:
        self.workers = [Incarnation(f"attention-{i}", 1) for i in range(num_workers)]
        self.per_worker = -(-num_sequences // num_workers)
        self.prompt = list(range(prompt_tokens))
        bounds = {"queued_requests_max": num_sequences, "queued_tokens_max": num_sequences * prompt_tokens}
        config = SchedulerConfig.model_validate({name: bound + 1 for name, bound in bounds.items()})
        self.config, self.scheduler, self.now_s = config, Scheduler(config, 1, FINGERPRINT), 1.0
        self.numbers = dict.fromkeys(self.workers, 0)
        self.running: dict[Incarnation, list[int]] = {worker: [] for worker in self.workers}  # handles
        self.scheduler.step(MembersExpected(frozenset(self.workers)), self.now_s)
        self.scheduler.step(GatewayJoined(GATEWAY, "127.0.0.1:1"), self.now_s)
        for worker in self.workers:
            self.hear(self.report(worker, hello=True))
        self.turn()
        for worker in self.workers:
            self.hear(self.report(worker, state=True))
        self.turn()
        for number in range(num_sequences):
            self.submit(f"request-{number:032x}")
        self.turn()
        assert sum(map(len, self.running.values())) == num_sequences

    def report(self, worker: Incarnation, *, hello: bool = False, state: bool = False) -> step_pb2.WorkerReport:
        """As its worker writes it, with nothing new."""
        report = step_pb2.WorkerReport(
            sender=identity_pb2.Incarnation(id=worker.id, number=worker.number),
            fingerprint=FINGERPRINT, term=1, plan_number=self.numbers[worker], steps=123_456, tokens=12_345_678,
            blocks_free=1_000_000, num_running=256,
        )  # fmt: skip
        if hello:
            report.hello.CopyFrom(
                step_pb2.WorkerHello(
                    block_tokens=32,
                    blocks_total=1_000_000,
                    sequences_max=4 * self.per_worker + 16,
                    model_len_max=1 << 20,
                )
            )
        if hello or state:
            report.state.SetInParent()
        return report

    def submit(self, request_id: str) -> None:
        submit = schedule_pb2.Submit(
            request_id=request_id,
            prompt=self.prompt,
            spec=step_pb2.SequenceSpec(sampling=step_pb2.Sampling(temperature=1, top_p=1), max_tokens=512),
            siblings=[schedule_pb2.Sibling(index=0, attempt=1, seed=7)],
        )
        message = schedule_pb2.GatewayMessage(fingerprint=FINGERPRINT, submit=submit)
        self.scheduler.step(wire.decode_gateway(message, GATEWAY, self.config), self.now_s)

    def hear(self, report: step_pb2.WorkerReport) -> None:
        worker = wire.decode_incarnation(report.sender)
        self.scheduler.step(wire.decode_worker(report, worker), self.now_s)

    def turn(self) -> list[bytes]:
        """What the shell does once its inbox is empty; returns the encoded plans."""
        self.scheduler.step(Tick(), self.now_s)
        sent = []
        for command in self.scheduler.round(self.now_s):
            message = wire.encode(command, 1, FINGERPRINT)  # type: ignore[arg-type]
            if isinstance(command, SendPlan):
                self.numbers[command.to] = command.plan.number
                self.running[command.to] += [start.handle for start in command.plan.starts]
            sent.append(message.SerializeToString())
        return sent

    def timed(self, reports: Sequence[bytes]) -> tuple[float, int]:
        """Milliseconds and bytes of a round that begins with these reports. Garbage of before is collected
        before; that of the round, within it, as in a long-lived process."""
        gc.collect()
        begin_s = time.process_time()
        for encoded in reports:
            self.hear(step_pb2.WorkerReport.FromString(encoded))
        sent = self.turn()
        elapsed_s = time.process_time() - begin_s
        return elapsed_s * 1e3, sum(map(len, reports)) + sum(map(len, sent))


def _undisturbed(bench: Bench) -> tuple[float, int]:
    return bench.timed([bench.report(worker).SerializeToString() for worker in bench.workers])


def _prompts(bench: Bench) -> float:
    reports = []
    for worker in bench.workers:
        report = bench.report(worker)
        report.prompts_done.extend(bench.running[worker])
        reports.append(report.SerializeToString())
        bench.submit(f"next-{worker.id}")
    return bench.timed(reports)[0]


def _ending(bench: Bench) -> float:
    reports = []
    for worker in bench.workers:
        report = bench.report(worker)
        handles, bench.running[worker] = bench.running[worker], []
        report.endings.handles.extend(handles)
        report.endings.reasons.extend([step_pb2.FINISH_REASON_LENGTH] * len(handles))
        report.endings.num_tokens.extend([512] * len(handles))
        reports.append(report.SerializeToString())
        bench.submit(f"last-{worker.id}")
    return bench.timed(reports)[0]


def measure(num_sequences: int, num_workers: int, repeats: int, prompt_tokens: int = 512) -> Point:
    """Each repeat has a scheduler of its own."""
    ending, prompts, undisturbed, num_bytes = [], [], [], 0
    for _ in range(repeats):
        bench = Bench(num_sequences, num_workers, prompt_tokens)
        gc.freeze()
        elapsed_ms, num_bytes = _undisturbed(bench)
        undisturbed.append(elapsed_ms)
        prompts.append(_prompts(bench))
        ending.append(_ending(bench))
        gc.unfreeze()
    return Point(num_sequences, num_workers, _median(ending), _median(prompts), _median(undisturbed), num_bytes)


def _median(times_ms: Sequence[float]) -> float:
    return round(statistics.median(times_ms), 2)
