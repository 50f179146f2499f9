"""An attention worker as a process runs it: a compute thread, one for streams, one for handshakes. No Ray.

The compute thread owns the worker; everything else reaches it through a bounded inbox, drained between steps.
It goes on with its standing orders whatever happens to the scheduler.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from expertmesh.v1 import step_pb2

from attention_workers import wire
from attention_workers.attention_model import AttentionModel
from attention_workers.book import Book, OrderRefused
from attention_workers.config import AttentionConfig
from attention_workers.guides import Guides
from attention_workers.kv_blocks import KvBlocks
from attention_workers.kv_memory import KvMemory, kv_memory, model_len
from attention_workers.preparing import Preparing
from attention_workers.step import Plan, StepResult
from attention_workers.streams import AttemptsRefused, GatewayGone, Item, Snapshot, Streams, still_said
from attention_workers.trace_records import BYTES_MAX
from attention_workers.worker import AttentionWorker
from model.attention import TILE
from model.checkpoint import Checkpoint, attention_tensor_names
from model.device import Kind, take
from model.errors import ModelError
from model.exact import NumericsError
from model.layer_types import FULL, SLIDING
from model.memory import available_bytes, bytes_in_memory, choose, require
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.errors import ExpertsUnavailable, RouterError
from router.membership import Adopted, Failed, Health, HealthState, MemberEvent, PeerLost
from router.placement import Member, Placement
from router.transport.base import LinkIdentity
from router.transport.cuda import gpu_for
from router.transport.select import attention_end

log = logging.getLogger(__name__)

_INBOX_MAX = 4096
_IDLE_WAIT_S = 1.0
_RETRY_WAIT_S = 0.02
PERMANENT = (ModelError, NumericsError, RouterError)


class PlacementPrepared:
    """There are links to adopt."""


class GrammarBegun:
    """A sequence that waited for its grammar can be computed."""


_Item = Item | PlacementPrepared | GrammarBegun | None


class AttentionService:
    def __init__(
        self,
        model_path: Path,
        member: Member,
        token: str,
        config: AttentionConfig,
        router: RouterConfig,
        transport: str,
        device: Kind,
        device_share: float,
        scheduler_address: str,
        on_event: Callable[[MemberEvent], None],
    ) -> None:
        """`device_share`: how much of a GPU's memory it may take, in (0, 1]."""
        self.member = member
        self._model_path, self._token, self._config, self._router = model_path, token, config, router
        self._transport = transport
        self._kind, self._device_share = device, device_share
        self._on_event = on_event
        self._inbox: queue.Queue[_Item] = queue.Queue(_INBOX_MAX)
        self._stopping = threading.Event()
        self._state, self._detail = HealthState.STARTING, ""
        self._bytes_loaded = self._bytes_total = 0
        self._worker: AttentionWorker | None = None
        self._kv: KvMemory | None = None
        self._has_new_orders = False
        self._commit_s_max = 0.0  # longest pause between two steps to use a new placement
        self._turns = 0
        self._missing_since_s: float | None = None  # experts, as far as the last step found
        self._guides: Guides | None = None
        self._streams = Streams(member, token, scheduler_address, config.token_backlog_max, self._tell, self._fail)
        self._preparing = Preparing(self._prepare, lambda: self._tell(PlacementPrepared()), self._fail)
        self._compute = threading.Thread(target=self._run, name="attention-compute", daemon=True)

    # --- from outside ------------------------------------------------------------------------

    def start(self) -> None:
        self._compute.start()

    def publish(self, placement: Placement) -> None:
        """Use this placement once its links are up or marked lost, from the next step on. Emits Adopted then."""
        self._preparing.offer(placement)

    def health(self) -> Health:
        counts, worker = self._streams.latest.counts, self._worker
        gauges: dict[str, float] = {}
        links: dict[str, str] = {}
        if worker is not None:
            gauges = {
                "kv_blocks_total": worker.book.spaces[FULL].total,
                "kv_blocks_free": counts.blocks_free - counts.blocks_cached,
                "kv_blocks_cached": counts.blocks_cached,
                **_sliding_gauges(worker, counts),
                **(self._kv.gauges() if self._kv is not None else {}),
                **_prefix_gauges(worker.book),
                "sequences": counts.num_running,
                "sequences_open": self._streams.num_open,
                "sequences_paused": counts.num_paused,
                "steps_total": counts.steps,
                "tokens_total": counts.tokens,
                "orders_refused_total": counts.refused_orders,
                "commit_seconds_max": self._commit_s_max,
                **worker.dispatcher.counters(),
                **worker.gauges(),
            }
            links = {member.id: kind for member, kind in worker.dispatcher.transports().items()}
        kept = (worker.model.bytes_kept, worker.model.kept_as) if worker is not None else (0, "")
        state = HealthState.DRAINING if self._state is HealthState.READY and counts.draining else self._state
        return Health(state, self._bytes_loaded, self._bytes_total, self._detail, gauges, *kept, links)

    def trace(self, seconds: float, bytes_max: int) -> bytes:
        """What the step trace holds of the last `seconds`, at most `bytes_max` of it, encoded. From any thread."""
        worker = self._worker
        if worker is None:
            return b""
        snapshot = worker.snapshot(self.member.id)
        return snapshot.since(snapshot.now_ns - int(seconds * 1e9), min(bytes_max, BYTES_MAX)).encode()

    def turns(self) -> dict[str, int]:
        """What grows while the threads turn, from the first placement on."""
        waits = self._worker.dispatcher.waits if self._worker is not None else 0
        return {"compute": self._turns + waits, "streams": self._streams.turns}

    def stop(self, grace_s: float) -> None:
        """End after the running step. Threads and descriptors are gone when this returns."""
        self._stopping.set()
        self._tell(None)  # wakes an idle worker
        self._compute.join(grace_s)
        if self._worker is not None:
            self._preparing.close(grace_s)
            if self._guides is not None:
                self._guides.close(grace_s)
            if not self._compute.is_alive():
                self._worker.dispatcher.close()
        self._streams.close(grace_s)

    # --- compute thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            worker = self._load()
        except PERMANENT as error:
            self._fail(str(error))
            return
        except Exception as error:
            # One of the process's two nets: a worker that cannot load must be seen as failed, with its reason.
            log.exception("attention worker %s", self.member)
            self._fail(f"{type(error).__name__}: {error}")
            return
        try:
            self._serve(worker)
        except Exception as error:
            # The other net: a worker that has lost its loop must be seen as failed and replaced.
            log.exception("attention worker %s", self.member)
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self._state, self._detail = HealthState.FAILED, why
        self._on_event(Failed(why))

    def _load(self) -> AttentionWorker:
        config = self._config
        torch.set_num_threads(config.threads)
        device = take(self._kind, self._device_share)
        checkpoint = Checkpoint.open(self._model_path)
        dtype = getattr(torch, checkpoint.config.dtype if config.dtype == "auto" else config.dtype)
        self._state, self._detail = HealthState.LOADING, "attention weights"
        names = attention_tensor_names(checkpoint.config)
        keep = choose(config.weights, bytes_in_memory(checkpoint, names, dtype, "dequantised", device), device)
        needed = bytes_in_memory(checkpoint, names, dtype, keep, device)
        require(needed, "attention weights", "accepted: a smaller checkpoint, or more memory", device)
        model = AttentionModel(
            checkpoint,
            device=device,
            dtype=dtype,
            keep=keep,
            numerics=config.numerics,
            positions_max=model_len(config, checkpoint.config),
            progress=self._progress,
        )
        kv = self._kv = self._make_kv(model)
        shape = checkpoint.config
        router = self._router.fitted(shape.experts_per_token, shape.hidden_size, dtype.itemsize)
        sequences_max = min(config.sequences_max, router.rows_max)  # each may be a row of one step
        self._guides = Guides(
            self._model_path / "tokenizer.json", shape.vocab_size, lambda: self._tell(GrammarBegun())
        )
        book = Book(
            checkpoint.fingerprint,
            self.member.incarnation,
            KvBlocks(kv.blocks[FULL]),
            TILE,
            sequences_max,
            kv.model_len,
            router.rows_max,
            None if kv.window is None else KvBlocks(kv.blocks[SLIDING], kv.window),
            config.prefix_cache,
            self._guides.open,
        )
        rows, replies = router.rows_sent(config.numerics), router.answers(config.numerics)
        identity = LinkIdentity(
            self.member, checkpoint.fingerprint, self._token, shape.hidden_size, dtype, rows, replies
        )
        end = attention_end(self._transport, identity, router, gpu=gpu_for(self._transport, device))
        dispatcher = Dispatcher(
            end, self.member, router, lambda peer: self._on_event(PeerLost(peer)), rows, replies
        )
        self._worker = AttentionWorker(model, book, dispatcher, config.microbatches)
        self._detail = "waiting for experts"
        self._preparing.start()
        return self._worker

    def _prepare(self, placement: Placement) -> None:
        """On the preparing thread."""
        assert self._worker is not None
        self._worker.dispatcher.prepare(placement)

    def _progress(self, done: int, total: int) -> None:
        self._bytes_loaded, self._bytes_total = done, total

    def _make_kv(self, model: AttentionModel) -> KvMemory:
        """Reserve the block spaces of full and of sliding layers."""
        config, device = self._config, model.device
        if config.kv_bytes:
            require(config.kv_bytes, "keys and values (kv_bytes)", "accepted: a smaller --kv-memory", device)
        free_bytes = config.kv_free_bytes or available_bytes(device)
        found = kv_memory(config, model.config, model.dtype, free_bytes, device.type != "cpu")
        model.make_kv(found.blocks)
        return found

    def _serve(self, worker: AttentionWorker) -> None:
        is_busy = False
        while not self._stopping.is_set():
            self._turns += 1
            result = StepResult()
            is_waiting = self._missing_since_s is not None and worker.book.sequences
            wait_s = _RETRY_WAIT_S if is_waiting else 0.0 if is_busy else _IDLE_WAIT_S
            self._drain_inbox(worker, result, wait_s)
            if self._has_new_orders:
                self._hand_over(worker, result)  # before a step: a stream that begins meanwhile tells of them
                result = StepResult()
            is_busy = self._state is HealthState.READY and self._step(worker, result)
            self._hand_over(worker, result)

    def _step(self, worker: AttentionWorker, result: StepResult) -> bool:
        """One step; False when there was nothing to compute, or an expert has no live holder.

        The same step is tried again for `experts_wait_s`; then its sequences are given back, and the scheduler
        keeps them until this worker says that experts are there.
        """
        try:
            has_computed = worker.step(result)
        except ExpertsUnavailable as error:
            now_s = time.monotonic()
            self._missing_since_s = now_s if self._missing_since_s is None else self._missing_since_s
            self._detail = f"waiting for experts: {error}"
            if now_s - self._missing_since_s > self._config.experts_wait_s:
                worker.book.give_back(result)
            return False
        if self._missing_since_s is not None:
            if worker.reaches_all_experts:
                self._missing_since_s, self._detail = None, ""
            elif has_computed:  # this step needed none of the missing: the wait begins anew
                self._missing_since_s = time.monotonic()
        return has_computed

    def _drain_inbox(self, worker: AttentionWorker, result: StepResult, wait_s: float) -> None:
        items: list[_Item] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait())
            while len(items) < _INBOX_MAX:
                items.append(self._inbox.get_nowait())
        for item in still_said(items):
            self._take(worker, item, result)

    def _take(self, worker: AttentionWorker, item: object, result: StepResult) -> None:
        if isinstance(item, Plan):
            try:
                self._has_new_orders = True
                worker.book.apply(item, result)
            except OrderRefused as refusal:
                log.warning("%s: %s", self.member, refusal)
        elif isinstance(item, PlacementPrepared):
            began_s = time.perf_counter()
            epoch = worker.dispatcher.adopt()
            self._commit_s_max = max(self._commit_s_max, time.perf_counter() - began_s)
            if epoch is not None:
                self._state = HealthState.READY
                self._detail = self._detail if self._missing_since_s is not None else ""
                self._on_event(Adopted(epoch))
                self._streams.open(worker.book)
        elif isinstance(item, GatewayGone):
            gone = [*worker.book.drop(item.address, result), *item.undelivered]
            result.completions = [c for c in result.completions if c.attempt not in gone]
            result.undelivered += gone
        elif isinstance(item, AttemptsRefused):
            worker.book.stop(item.attempts, result)

    def _hand_over(self, worker: AttentionWorker, result: StepResult) -> None:
        book = worker.book
        book.restate(result)
        counts = wire.report_pb(
            self.member, book, worker.steps, worker.tokens, experts_missing=self._missing_since_s is not None
        )
        is_news, running = result.is_news(), self._streams.latest.running
        if is_news or self._has_new_orders:
            running = wire.state_pb(book.state())
            self._has_new_orders = False
        latest = Snapshot(counts, running)
        if is_news or result.deltas:
            self._streams.hand_over(result, latest)
        else:
            self._streams.latest = latest

    def _tell(self, item: _Item) -> None:
        """From other threads. Never waits: so many unread messages mean that the compute thread hangs."""
        try:
            self._inbox.put_nowait(item)
        except queue.Full:
            self._fail(f"inbox: {_INBOX_MAX} messages unread; the compute thread hangs")


def _prefix_gauges(book: Book) -> dict[str, float]:
    """From another thread than the one that counts: each number is of one moment, all of them nearly so."""
    cache = book.prefixes
    return {
        "prefix_tokens_total": cache.num_tokens,
        "prefix_hit_tokens_total": cache.num_hit_tokens,
        "prefix_hits_total": cache.num_hits,
        "kv_evictions_total": sum(space.num_evicted for space in book.spaces.values()),
    }


def _sliding_gauges(worker: AttentionWorker, counts: step_pb2.WorkerReport) -> dict[str, float]:
    space = worker.book.spaces.get(SLIDING)
    if space is None:
        return {}
    return {
        "kv_sliding_blocks_total": space.total,
        "kv_sliding_blocks_free": counts.sliding_blocks_free - counts.sliding_blocks_cached,
        "kv_sliding_blocks_cached": counts.sliding_blocks_cached,
    }
