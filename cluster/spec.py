"""What every process of one cluster is told at birth: the configuration, the checkpoint's facts, where to meet.

Travels as JSON. On one host, addresses are abstract Unix sockets named after a cluster id drawn for each `serve`:
they end with the processes that hold them, and two clusters on one host never meet. Between hosts they are TCP
ports; the deciders' are fixed at launch, on the node of `serve`, so that they stay what they are over every life.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from cluster.config import Config

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class CheckpointFacts:
    """What the processes that read no tensors need to know of the checkpoint."""

    fingerprint: str
    num_layers: int
    num_experts: int  # of one layer
    vocab_size: int
    context: int  # longest prompt and answer together that it allows, in tokens


@dataclass(frozen=True)
class MeetingPoint:
    """Where the deciders of a cluster on several hosts are reached: on one node, which they never leave."""

    host: str
    node_id: str  # Ray's
    controller_port: int
    scheduler_port: int


@dataclass(frozen=True)
class ClusterSpec:
    cluster_id: str
    token: str  # the secret of the cluster's own links
    config: Config
    facts: CheckpointFacts
    meeting: MeetingPoint | None = None  # None: all on one host

    @property
    def controller_address(self) -> str:
        return _tcp(self.meeting.host, self.meeting.controller_port) if self.meeting else self._unix("controller")

    @property
    def scheduler_address(self) -> str:
        return _tcp(self.meeting.host, self.meeting.scheduler_port) if self.meeting else self._unix("scheduler")

    def token_address(self, gateway: str, incarnation: int, node_ip: str) -> str:
        """What a gateway on this node binds for workers' tokens: another place for each of its lives."""
        return _tcp(node_ip, 0) if self.meeting else self._unix(f"{gateway}.{incarnation}")

    def exchange_host(self, node_ip: str) -> str:
        """What an expert worker on this node binds for the exchange."""
        return node_ip if self.meeting else _LOOPBACK

    def _unix(self, name: str) -> str:
        return f"unix-abstract:expertmesh-{self.cluster_id}-{name}"

    def to_json(self) -> str:
        tree = {
            "cluster_id": self.cluster_id,
            "token": self.token,
            "config": json.loads(self.config.to_json()),
            "facts": dataclasses.asdict(self.facts),
            "meeting": dataclasses.asdict(self.meeting) if self.meeting else None,
        }
        return json.dumps(tree)

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        tree = json.loads(text)
        config = Config.model_validate(tree["config"])
        meeting = MeetingPoint(**tree["meeting"]) if tree["meeting"] else None
        return cls(tree["cluster_id"], tree["token"], config, CheckpointFacts(**tree["facts"]), meeting)


def _tcp(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
