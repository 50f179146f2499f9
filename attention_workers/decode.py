"""One step over all layers: the figure as code."""

from __future__ import annotations

import time
from typing import Protocol, TypeVar

from torch import Tensor

from attention_workers.attention_model import AttentionModel, Microbatch
from attention_workers.microbatch import ping_pong
from attention_workers.step_trace import StepTrace
from model.gate import Routes

P = TypeVar("P")  # a dispatch that waits to be combined


class Experts(Protocol[P]):
    """What the loop needs of the dispatcher: rows, routes and their sum lie on the model's device."""

    def dispatch(self, layer: int, rows: Tensor, routes: Routes) -> P: ...

    def combine(self, pending: P) -> Tensor: ...

    def abandon(self, pending: P) -> None: ...


def decode_step(
    model: AttentionModel, microbatches: list[Microbatch], experts: Experts[P], trace: StepTrace
) -> list[Tensor]:
    """Logits of each microbatch's sampling rows: [n, V] each. When it raises, nothing is left in flight."""
    pending: dict[int, P] = {}
    try:
        for work in ping_pong(model.config.num_layers, len(microbatches)):
            mb, began_ns = microbatches[work.microbatch], time.perf_counter_ns()
            if work.op == "dispatch":
                mb.hidden = model.attend(work.layer, mb)  # [T, H]
                normed = model.norm_before_experts(work.layer, mb.hidden)  # [T, H]
                routes = model.gate(work.layer, normed)  # [T, K]
                attended_ns = time.perf_counter_ns()
                pending[work.microbatch] = experts.dispatch(work.layer, normed, routes)
                trace.dispatched(work.microbatch, began_ns, attended_ns)
            else:
                mixed = experts.combine(pending.pop(work.microbatch))  # [T, H] float32
                mb.hidden = mb.hidden + mixed.to(mb.hidden.dtype)
                trace.combined(work.layer, work.microbatch, began_ns)
    finally:
        for left in pending.values():
            experts.abandon(left)
    return [model.unembed(mb) for mb in microbatches]
