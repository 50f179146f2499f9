"""Between `expertmesh.v1` messages and the scheduler's values. The only place that knows both.

Decoding checks every field that a bound or a count depends on, and raises MalformedMessage. Token lists
stay the containers they came in: the scheduler reads their length only, and copying one into a plan then
costs a memcpy rather than an object per token.
"""

from __future__ import annotations

from expertmesh.v1 import identity_pb2, schedule_pb2, step_pb2

from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.errors import MalformedMessage
from cluster.scheduler.events import (
    NO_ENDINGS,
    Accept,
    AttemptId,
    CancelRequested,
    CloseAttempt,
    Endings,
    FinishReason,
    FinishRequested,
    GatewayJoined,
    Incarnation,
    Reject,
    Running,
    SendPlan,
    Sibling,
    Submission,
    Submitted,
    Welcome,
    WorkerJoined,
    WorkerLimits,
    WorkerReported,
)

ID_BYTES_MAX = 256  # of a request's, gateway's or worker's id
ADDRESS_BYTES_MAX = 1024
START_BYTES = 2048  # of a start in a plan, beside what its submission holds: ids, address, arrival

SECONDS_MAX = 1e9  # that a request may have, or have waited
FINISH_REASONS = frozenset(map(int, FinishReason))


def decode_incarnation(message: identity_pb2.Incarnation) -> Incarnation:
    _check_text("sender.id", message.id, ID_BYTES_MAX)
    return Incarnation(message.id, message.number)


def decode_gateway(
    message: schedule_pb2.GatewayMessage, gateway: Incarnation, config: SchedulerConfig
) -> GatewayJoined | Submitted | CancelRequested | FinishRequested:
    body = message.WhichOneof("body")
    if body == "hello":
        _check_text("hello.token_address", message.hello.token_address, ADDRESS_BYTES_MAX)
        return GatewayJoined(gateway, message.hello.token_address)
    if body == "submit":
        return Submitted(gateway, _submission(message.submit, message.fingerprint, config))
    if body == "cancel":
        _check_text("cancel.request_id", message.cancel.request_id, ID_BYTES_MAX)
        return CancelRequested(gateway, message.cancel.request_id)
    if body == "finish":
        return FinishRequested(gateway, _attempt(message.finish.attempt))
    raise MalformedMessage("body is empty, accepted: hello, submit, cancel, finish")


def decode_worker(message: step_pb2.WorkerReport, worker: Incarnation) -> WorkerJoined | WorkerReported:
    report = WorkerReported(
        worker=worker,
        term=message.term,
        plan_number=message.plan_number,
        refused_orders=message.refused_orders,
        blocks_free=message.blocks_free,
        sliding_blocks_free=message.sliding_blocks_free,
        num_paused=message.num_paused,
        tokens=message.tokens,
        experts_missing=message.experts_missing,
        draining=message.draining,
        prompts_done=message.prompts_done,
        undelivered=tuple(map(_attempt, message.undelivered)),
        endings=_endings(message.endings) if message.HasField("endings") else NO_ENDINGS,
        paused=tuple(map(_attempt, message.paused)),
        state=tuple(map(_running, message.state.running)) if message.HasField("state") else None,
        kept=message.kept,
        evicted=message.evicted,
    )
    if not message.HasField("hello"):
        return report
    hello = message.hello
    for name in ("block_tokens", "blocks_total", "sequences_max", "model_len_max"):
        _check_range(f"hello.{name}", getattr(hello, name), 1)
    if hello.sliding_window:
        _check_range("hello.sliding_blocks_total", hello.sliding_blocks_total, 1)
    _check_range("blocks_free", report.blocks_free, 0, hello.blocks_total)
    _check_range("sliding_blocks_free", report.sliding_blocks_free, 0, hello.sliding_blocks_total)
    limits = WorkerLimits(
        hello.block_tokens, hello.blocks_total, hello.sequences_max, hello.model_len_max,
        hello.sliding_blocks_total, hello.sliding_window, hello.prefix_cache,
    )  # fmt: skip
    return WorkerJoined(worker, message.fingerprint, limits, report)


def encode(
    command: SendPlan | Welcome | Accept | Reject | CloseAttempt, term: int, fingerprint: str
) -> step_pb2.Plan | schedule_pb2.GatewayOrder:
    if isinstance(command, SendPlan):
        return _plan(command, term, fingerprint)
    return _order(command, term, fingerprint)


def _plan(command: SendPlan, term: int, fingerprint: str) -> step_pb2.Plan:
    plan = command.plan
    message = step_pb2.Plan(
        term=term,
        number=plan.number,
        to=identity_pb2.Incarnation(id=command.to.id, number=command.to.number),
        fingerprint=fingerprint,
        stops=[encode_attempt(attempt) for attempt in plan.stops],
        step_tokens_max=plan.step_tokens_max,
        chunk_tokens_max=plan.chunk_tokens_max,
        inter_token_s=plan.inter_token_s,
        send_state=plan.send_state,
        draining=plan.draining,
    )
    for start in plan.starts:
        added = message.starts.add(
            attempt=encode_attempt(start.attempt),
            gateway_address=start.gateway_address,
            prompt=start.prompt,
            accepted=start.accepted,
            spec=start.spec,
            priority=start.priority,
            arrival=start.arrival,
            score_from=start.score_from,
            handle=start.handle,
        )
        added.spec.sampling.seed = start.seed
    return message


def _order(
    command: Welcome | Accept | Reject | CloseAttempt, term: int, fingerprint: str
) -> schedule_pb2.GatewayOrder:
    order = schedule_pb2.GatewayOrder(term=term, fingerprint=fingerprint)
    match command:
        case Welcome():
            order.welcome.CopyFrom(schedule_pb2.Welcome(model_len_max=command.model_len_max))
        case Accept():
            accepted = schedule_pb2.Accepted(request_id=command.request_id, queued_before=command.queued_before)
            order.accepted.CopyFrom(accepted)
        case Reject():
            rejected = schedule_pb2.Rejected(
                request_id=command.request_id,
                code=f"REJECT_CODE_{command.code.name}",
                message=command.message,
                retry_after_s=command.retry_after_s,
            )
            order.rejected.CopyFrom(rejected)
        case CloseAttempt():
            closed = schedule_pb2.AttemptClosed(
                attempt=encode_attempt(command.attempt),
                reason=f"CLOSE_REASON_{command.reason.name}",
                detail=command.detail,
            )
            order.closed.CopyFrom(closed)
    return order


def _submission(submit: schedule_pb2.Submit, fingerprint: str, config: SchedulerConfig) -> Submission:
    _check_text("submit.request_id", submit.request_id, ID_BYTES_MAX)
    if submit.tenant:
        _check_text("submit.tenant", submit.tenant, ID_BYTES_MAX)
    num_bytes = submit.ByteSize() + START_BYTES
    _check_range("submit size in bytes", num_bytes, 1, config.message_bytes_max)
    _check_range("submit.prompt length", len(submit.prompt), 1)
    _check_range("submit.spec.max_tokens", submit.spec.max_tokens, 1)
    _check_range("submit.siblings length", len(submit.siblings), 1, config.siblings_max)
    if len({sibling.index for sibling in submit.siblings}) < len(submit.siblings):
        raise MalformedMessage("submit.siblings: an index occurs twice, accepted: each once")
    for name in ("time_left_s", "waited_s"):
        if not 0 <= getattr(submit, name) <= SECONDS_MAX:
            raise MalformedMessage(f"submit.{name} is {getattr(submit, name)}, accepted: 0 to {SECONDS_MAX:g}")
    for sibling in submit.siblings:
        _check_range("submit.siblings.attempt", sibling.attempt, 1)
        accepted_max = submit.spec.max_tokens - 1
        _check_range("submit.siblings.accepted length", len(sibling.accepted), 0, accepted_max)
        _check_range("submit.siblings.score_from", sibling.score_from, 0, len(submit.prompt) - 1)
    return Submission(
        request_id=submit.request_id,
        fingerprint=fingerprint,
        prompt=submit.prompt,
        max_tokens=submit.spec.max_tokens,
        spec=submit.spec,
        siblings=tuple(Sibling(s.index, s.attempt, s.seed, s.accepted, s.score_from) for s in submit.siblings),
        priority=submit.priority,
        resume=submit.resume,
        num_bytes=num_bytes,
        tenant=submit.tenant,
        time_left_s=submit.time_left_s,
        waited_s=submit.waited_s,
        cache_salt=submit.spec.cache_salt,
    )


def _attempt(message: identity_pb2.Attempt) -> AttemptId:
    return AttemptId(message.request_id, message.index, message.number)


def encode_attempt(attempt: AttemptId) -> identity_pb2.Attempt:
    return identity_pb2.Attempt(request_id=attempt.request_id, index=attempt.index, number=attempt.number)


def _endings(message: step_pb2.Endings) -> Endings:
    """Slices: one call for a column of thousands, where iterating would make one for each."""
    handles, reasons, num_tokens = message.handles[:], message.reasons[:], message.num_tokens[:]
    if unknown := set(reasons) - FINISH_REASONS:
        raise MalformedMessage(f"endings.reasons has {min(unknown)}, accepted: {sorted(FINISH_REASONS)}")
    for name, column, length in (
        ("reasons", reasons, len(handles)),
        ("num_tokens", num_tokens, len(handles)),
        ("details", message.details, reasons.count(step_pb2.FINISH_REASON_FAILED)),
    ):
        _check_range(f"endings.{name} length", len(column), length, length)
    return Endings(handles, reasons, num_tokens, message.details)


def _running(message: step_pb2.RunningSequence) -> Running:
    _check_text("state.running.attempt.request_id", message.attempt.request_id, ID_BYTES_MAX)
    _check_range("state.running.handle", message.handle, 1)
    return Running(
        _attempt(message.attempt), message.num_tokens, message.prompt_done, message.arrival, message.handle
    )


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        accepted = f"{low} or more" if high is None else f"{low} to {high}"
        raise MalformedMessage(f"{name} is {value}, accepted: {accepted}")


def _check_text(name: str, value: str, bytes_max: int) -> None:
    if not 1 <= len(value.encode()) <= bytes_max:
        raise MalformedMessage(f"{name} is {value[:64]!r}, accepted: 1 to {bytes_max} bytes")
