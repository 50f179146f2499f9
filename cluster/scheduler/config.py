"""The scheduler's bounds: every queue, wait and message has its name here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SchedulerConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    queued_requests_max: int = Field(1024, ge=1)
    """Requests that wait for a worker; beyond it new ones are refused. Resumes always enter."""

    queued_tokens_max: int = Field(4_194_304, ge=1)
    """Prompt tokens that wait, all requests together. A request larger than this enters an empty queue."""

    queue_wait_s_max: float = Field(600.0, gt=0)
    """A sequence that no worker could take for this long is given up and its client told."""

    siblings_max: int = Field(128, ge=1, le=4096)
    """Sequences of one request."""

    first_token_s: float = Field(60.0, ge=0)
    """The promised time in the queue: a request that would wait for longer, at the measured rate of completions,
    is refused at once. 0: nothing is promised, only the queue's bounds refuse."""

    priority_step_s: float = Field(10.0, ge=0)
    """How much earlier one level of priority makes a sequence count as come, among its tenant's."""

    overtake_s_max: float = Field(300.0, ge=0)
    """By priority nobody overtakes who came this long before: the bound of starvation."""

    preempt_after_s: float = Field(1.0, ge=0)
    """How long the next in turn waits for room before sequences of lower priority give way to it."""

    yields_max: int = Field(2, ge=0)
    """How often a sequence gives way to a higher priority, or is moved or lost for other reasons, before nobody
    may ask it any more, nor move it because its worker is dry. 0: nobody gives way, or is moved for that."""

    victims_max: int = Field(8, ge=1)
    """Sequences that give way to one, at most."""

    tenants_remembered_max: int = Field(4096, ge=2)
    """Accounts of what tenants were served. Beyond it the half that owes most is kept."""

    inter_token_s: float = Field(0.0, ge=0)
    """The promised time between two tokens: how long a step may take that computes a prompt beside decodes. 0: in
    proportion to what the decodes alone take."""

    step_tokens_max: int = Field(512, ge=1)
    """Rows of one step of a worker: decodes first, prompt chunks fill the rest."""

    chunk_tokens_max: int = Field(256, ge=1)
    """Rows of one prompt in one step. Smaller: steadier gaps between tokens, slower first token."""

    prefix_hints_max: int = Field(32_768, ge=1)
    """Cached blocks remembered of each worker, to place by; those longest unused are forgotten first. About 100
    bytes each."""

    drain: Literal["move", "finish"] = "move"
    """What becomes of sequences at a draining worker: moved, one after another, to workers that have room for all
    they can become, and computed again there; or left to finish where they are. Nothing new goes there either
    way."""

    gateway_lease_s: float = Field(5.0, ge=0)
    """How long a gateway's requests outlive its link, and running sequences nobody has claimed."""

    worker_deadline_s: float = Field(0.25, ge=0)
    """How long a worker's sequences outlive its link. Short: where processes share a host the link ends
    because the process did; just long enough to come back after the scheduler itself was frozen."""

    recovery_deadline_s: float = Field(10.0, ge=0)
    """How long a new term waits for the expected workers to say what they run before it places anything."""

    ended_remembered_max: int = Field(65_536, ge=1)
    """Ended attempts whose arrival is remembered, so that a resume keeps its place in the queue."""

    retry_after_s_min: float = Field(1.0, gt=0)
    retry_after_s_max: float = Field(60.0, gt=0)
    """Bounds of the advice given with a refusal for load."""

    rate_window_s: float = Field(30.0, gt=0)
    """Over which the rate of completions, on which that advice rests, is averaged."""

    tick_s: float = Field(0.05, gt=0)
    """Longest pause between two looks at the deadlines."""

    tick_gap_s_max: float = Field(1.0, gt=0)
    """A longer silence of our own clock means that we were frozen: every deadline starts again."""

    message_bytes_max: int = Field(16 * 2**20, ge=4096)
    """Largest message taken from a gateway or worker."""

    plan_bytes_max: int = Field(32 * 2**20, ge=8192)
    """Largest plan; what does not fit goes with the next."""

    link_inbox_max: int = Field(256, ge=1)
    """Messages of one stream not yet handled, and likewise orders it has not yet taken, beyond which it is
    not read: a peer is slowed down before it is cut off."""

    link_outbox_max: int = Field(65_536, ge=1)
    """Orders waiting for one peer; beyond it its stream is closed, and settled when it joins again."""

    links_max: int = Field(1024, ge=1)
    """Streams at once, gateways and workers together."""

    keepalive_s: float = Field(10.0, ge=1)
    keepalive_timeout_s: float = Field(10.0, ge=1)
    """A silent peer is asked after this long, and its stream ended when it stays silent that long."""

    @model_validator(mode="after")
    def _relations(self) -> SchedulerConfig:
        for low, high in (
            ("chunk_tokens_max", "step_tokens_max"),
            ("retry_after_s_min", "retry_after_s_max"),
            ("tick_s", "tick_gap_s_max"),
            ("link_inbox_max", "link_outbox_max"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} must not exceed {high} {getattr(self, high)}")
        if self.plan_bytes_max < 2 * self.message_bytes_max:
            raise ValueError(
                f"plan_bytes_max {self.plan_bytes_max} must be at least twice message_bytes_max "
                f"{self.message_bytes_max}, so that the largest request fits into a plan"
            )
        return self
