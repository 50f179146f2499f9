"""A step trace as Chrome trace events, which ui.perfetto.dev shows. Torch-free.

One process per attention worker. Its first thread is the compute thread: steps, and in them attention, dispatch,
wait and merge of each layer and microbatch. Then a thread for each expert worker and microbatch: replies from sent
to heard, and in them queue and computing, placed as if the link were as slow one way as the other. Attention
workers are laid side by side by when their traces were taken, not by their clocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from attention_workers.trace_records import Records, Snapshot

_COMPUTE = 1  # thread number
_KINDS = ("decode", "prefill")
_LANES = 8  # threads kept for each expert worker: one for each microbatch

Event = dict[str, Any]


def write_events(snapshots: Sequence[Snapshot], out: TextIO) -> int:
    """The whole file, an event a line; how many there were."""
    began_ns = min((int(s.steps["began_ns"].min()) - s.now_ns for s in snapshots if len(s.steps)), default=0)
    count = 0
    out.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
    for process, snapshot in enumerate(snapshots, 1):
        for event in events(snapshot, process, -snapshot.now_ns - began_ns):
            out.write((",\n" if count else "") + json.dumps(event))
            count += 1
    out.write("\n]}\n")
    return count


def events(snapshot: Snapshot, process: int, shift_ns: int) -> Iterator[Event]:
    """Times in microseconds, after `shift_ns` was added."""
    yield from _names(snapshot, process)
    for event in (*_steps(snapshot.steps), *_exchanges(snapshot.exchanges), *_replies(snapshot)):
        event["ts"] = (event["ts"] + shift_ns) / 1e3
        event["dur"] /= 1e3
        yield {"ph": "X", "pid": process, **event}


def _names(snapshot: Snapshot, process: int) -> Iterator[Event]:
    def named(what: str, thread: int, name: str) -> Event:
        return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}

    yield named("process_name", 0, snapshot.worker)
    yield named("thread_name", _COMPUTE, "compute")
    lanes = sorted({(int(peer), int(mb)) for peer, mb in snapshot.replies[["peer", "microbatch"]].tolist()})
    for peer, microbatch in lanes:
        yield named("thread_name", _lane(peer, microbatch), f"{snapshot.peers[peer]} microbatch {microbatch}")


def _lane(peer: int, microbatch: int) -> int:
    return _COMPUTE + 1 + peer * _LANES + microbatch


def _rows(records: Records) -> Iterable[Event]:
    names = records.dtype.names or ()
    return (dict(zip(names, values, strict=True)) for values in records.tolist())


def _steps(steps: Records) -> Iterator[Event]:
    for step in _rows(steps):
        args = {name: step[name] for name in ("number", "rows", "sequences", "microbatches")}
        took_ns = step["ended_ns"] - step["began_ns"]
        yield _event(f"{_KINDS[step['is_prefill']]} step", "step", _COMPUTE, step["began_ns"], took_ns, args)


def _exchanges(exchanges: Records) -> Iterator[Event]:
    for exchange in _rows(exchanges):
        where = f"layer {exchange['layer']} microbatch {exchange['microbatch']}"
        args = {name: exchange[name] for name in ("step", "layer", "microbatch")}
        at_ns = exchange["attended_from_ns"]
        for phase, field in (("attention", "attend_ns"), ("dispatch", "dispatch_ns")):
            yield _event(f"{phase} {where}", phase, _COMPUTE, at_ns, exchange[field], args)
            at_ns += exchange[field]
        at_ns = exchange["waited_from_ns"]
        waited = args | {"experts_us": exchange["experts_ns"] / 1e3, "last_by_us": exchange["last_by_ns"] / 1e3}
        yield _event(f"wait {where}", "wait", _COMPUTE, at_ns, exchange["wait_ns"], waited)
        yield _event(f"merge {where}", "merge", _COMPUTE, at_ns + exchange["wait_ns"], exchange["merge_ns"], args)


def _replies(snapshot: Snapshot) -> Iterator[Event]:
    for reply in _rows(snapshot.replies):
        lane = _lane(reply["peer"], reply["microbatch"])
        args = {"step": reply["step"], "layer": reply["layer"]}
        whole_ns = max(0, reply["heard_ns"] - reply["sent_ns"])
        queued_ns = min(reply["queued_ns"], whole_ns)
        computed_ns = min(reply["computed_ns"], whole_ns - queued_ns)
        at_ns = reply["sent_ns"] + (whole_ns - queued_ns - computed_ns) // 2
        yield _event(f"layer {reply['layer']}", "exchange", lane, reply["sent_ns"], whole_ns, args)
        if queued_ns:
            yield _event("queue", "queue", lane, at_ns, queued_ns, args)
        yield _event("experts", "experts", lane, at_ns + queued_ns, computed_ns, args)


def _event(name: str, category: str, thread: int, at_ns: int, took_ns: int, args: Event) -> Event:
    return {"name": name, "cat": category, "tid": thread, "ts": at_ns, "dur": took_ns, "args": args}
