"""What a client asks of the sampler arrives at the worker: gateway's message, scheduler's plan, worker's order."""

from __future__ import annotations

from expertmesh.v1 import schedule_pb2, step_pb2

from attention_workers import step
from attention_workers import wire as worker_wire
from cluster.scheduler import wire as scheduler_wire
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.events import AttemptId, Incarnation, Plan, SendPlan, Start, Submitted
from gateway import wire
from gateway.port import Sibling, Submission
from gateway.request import Sampling


def arrived(sampling: Sampling, stop_token_ids: frozenset[int], min_tokens: int) -> step.Start:
    """The order that the worker makes of it."""
    siblings = (Sibling(0, 1, 77, score_from=1),)
    submission = Submission(
        "r", (1, 2), sampling, stop_token_ids, 9, 3, siblings, min_tokens=min_tokens, cache_salt="mine",
        num_prompt_logprobs=4,
    )  # fmt: skip
    gateway, worker = Incarnation("g", 1), Incarnation("w", 1)
    sent = schedule_pb2.GatewayMessage.FromString(
        schedule_pb2.GatewayMessage(submit=wire.submit(submission, 10_000), fingerprint="f").SerializeToString()
    )
    heard = scheduler_wire.decode_gateway(sent, gateway, SchedulerConfig())
    assert isinstance(heard, Submitted)
    spec, prompt = heard.submission.spec, heard.submission.prompt
    start = Start(
        AttemptId("r", 0, 1),
        "here",
        prompt,
        (),
        spec,
        siblings[0].seed,
        0,
        0,
        handle=1 << 63,
        score_from=heard.submission.siblings[0].score_from,
    )
    plan = scheduler_wire.encode(SendPlan(worker, Plan(1, (start,), (), 8, 8, 0.0, False)), 1, "f")
    assert heard.submission.cache_salt == "mine"
    (order,) = worker_wire.plan(step_pb2.Plan.FromString(plan.SerializeToString())).starts
    return order


def test_every_parameter_arrives() -> None:
    """To the last bit of a float64; the seed is the sibling's own."""
    rules = ((3, -100.0), (8, 0.1)), (4, 8), ((5,), (6, 7))
    asked = Sampling(0.7, 0.9, 40, 5, 0.01, 1.1, -0.3, 0.2, *rules)
    order = arrived(asked, frozenset({7, 9}), 4)
    assert order.sampling == step.Sampling(0.7, 0.9, 40, 77, 0.01, 1.1, -0.3, 0.2, *rules)
    assert (order.stop_token_ids, order.min_tokens, order.max_tokens) == (frozenset({7, 9}), 4, 9)
    assert (order.num_logprobs, order.cache_salt) == (3, "mine")
    assert (order.num_prompt_logprobs, order.score_from, order.handle) == (4, 1, 1 << 63)


def test_what_was_not_asked_changes_nothing() -> None:
    order = arrived(Sampling(), frozenset(), 0)
    assert order.sampling == step.Sampling(seed=77)
    assert not order.sampling.reshapes
