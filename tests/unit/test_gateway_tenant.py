"""Whose request it is: what a client says, and what the scheduler is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import wire
from gateway.config import GatewayConfig
from gateway.errors import BadRequest
from gateway.port import Sibling, Submission
from gateway.request import Sampling
from gateway.validate import Validator
from tests.unit.gateway_world import card_of, write_checkpoint


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> Validator:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return Validator(card_of(folder), GatewayConfig(), 128)


def test_user_names_the_tenant_and_priority_the_place(validator: Validator) -> None:
    """A request without a user belongs to the tenant without a name."""
    named = validator.completion({"prompt": [1], "user": "team-a", "priority": -3}).requests[0]
    assert (named.tenant, named.priority) == ("team-a", -3)
    assert validator.completion({"prompt": [1]}).requests[0].tenant == ""
    with pytest.raises(BadRequest, match=r"user .*64 characters"):
        validator.completion({"prompt": [1], "user": "x" * 65})


def test_the_scheduler_is_told_the_tenant() -> None:
    asked = Submission("r", (1,), Sampling(), frozenset(), 4, None, (Sibling(0, 1, 7),), tenant="team-a")
    assert wire.submit(asked, 10_000).tenant == "team-a"
