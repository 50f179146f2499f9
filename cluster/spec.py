"""What every process of one cluster is told at birth: the configuration, the checkpoint's facts, where to meet.

Travels as JSON. Addresses are abstract Unix sockets named after a cluster id drawn for each `serve`: they end
with the processes that hold them, and two clusters on one host never meet.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from cluster.config import Config


@dataclass(frozen=True)
class CheckpointFacts:
    """What the processes that read no tensors need to know of the checkpoint."""

    fingerprint: str
    num_layers: int
    num_experts: int  # of one layer
    vocab_size: int
    context: int  # longest prompt and answer together that it allows, in tokens


@dataclass(frozen=True)
class ClusterSpec:
    cluster_id: str
    token: str  # the secret of the cluster's own links
    config: Config
    facts: CheckpointFacts

    @property
    def controller_address(self) -> str:
        return self._address("controller")

    @property
    def scheduler_address(self) -> str:
        return self._address("scheduler")

    def token_address(self, gateway: str, incarnation: int) -> str:
        """Where workers send a gateway's tokens: another place for each of its lives."""
        return self._address(f"{gateway}.{incarnation}")

    def _address(self, name: str) -> str:
        return f"unix-abstract:expertmesh-{self.cluster_id}-{name}"

    def to_json(self) -> str:
        tree = {
            "cluster_id": self.cluster_id,
            "token": self.token,
            "config": json.loads(self.config.to_json()),
            "facts": dataclasses.asdict(self.facts),
        }
        return json.dumps(tree)

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        tree = json.loads(text)
        config = Config.model_validate(tree["config"])
        return cls(tree["cluster_id"], tree["token"], config, CheckpointFacts(**tree["facts"]))
