"""The bounds and costs of simulated clusters: real configuration, with short waits so that stories are short."""

from __future__ import annotations

from cluster.balancer.config import BalancerConfig
from cluster.roster import Patience
from cluster.scheduler.config import SchedulerConfig
from expert_workers.config import ExpertConfig
from gateway.config import GatewayConfig
from router.config import Replies, RouterConfig

HEARTBEAT_S = 0.5
BLOCK_TOKENS = 4
BLOCKS = 20
SLIDING_BLOCKS = 10
SLIDING_WINDOW = 9
SEQUENCES_MAX = 6
MODEL_LEN_MAX = 80
TOKEN_BACKLOG_MAX = 64
EXPERTS_WAIT_S = 4.0
RETRY_S = 0.1  # of a step that found experts missing
REPORT_EVERY_S = 0.25
IDLE_WAIT_S = 1.0

# What work costs, by the worker's clock.
START_S = (0.3, 1.0)  # of a process, until it turns
ATTENTION_S, ATTENTION_ROW_S = 0.05, 0.002  # of a microbatch at one layer
EXPERTS_S, EXPERTS_ROW_S = 0.004, 0.0005  # of a batch
LOAD_SLOT_S = 0.05  # of one expert's weights

PATIENCE = Patience(
    member_deadline_s=2.0,
    doubt_s=2 * HEARTBEAT_S,
    startup_timeout_s=15.0,
    settled_s=5.0,
    backoff_s_min=0.2,
    backoff_s_max=2.0,
)
COMPANION_DEADLINE_S = 4.0
"""A scheduler, controller or gateway silent for so long is killed."""

SCHEDULER = SchedulerConfig.model_validate({
    "queued_requests_max": 8,
    "first_token_s": 20.0,
    "step_tokens_max": 16,
    "chunk_tokens_max": 8,
    "gateway_lease_s": 2.0,
    "worker_deadline_s": 0.25,
    "recovery_deadline_s": 3.0,
    "retry_after_s_min": 0.5,
    "retry_after_s_max": 2.0,
    "tick_s": 0.1,
})  # fmt: skip
GATEWAY = GatewayConfig(submit_timeout_s=3.0, connect_timeout_s=1.0, silence_s_max=600.0)
EXPERT = ExpertConfig(join_wait_s=0.01)
BALANCE_S = (0.02, 1.0)  # until a rebalancing is worked out


def balancer(spare_slots: int) -> BalancerConfig:
    return BalancerConfig(spare_slots=spare_slots, moves_max=6, gain_min=0.01)


def router(replies: Replies) -> RouterConfig:
    return RouterConfig(combine_timeout_s=1.0, combine_total_s=8.0, connect_timeout_s=0.5, replies=replies)
