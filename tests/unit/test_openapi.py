"""Our OpenAPI document is what we answer: made-up cases of every endpoint, good and bad, by schemathesis."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from schemathesis.core.failures import FailureGroup

from gateway import openapi
from tests.unit.openapi_run import operations, run, served

CASES = 12  # of each endpoint; `make fuzz` takes more


@pytest.fixture
def schema(tmp_path: Path) -> Any:
    return served(tmp_path)


def test_no_answer_is_a_server_error_or_undocumented(schema: Any) -> None:
    """And the cases are no monologue: of those with a body some are answered, and some refused. How many of which
    endpoint depends on what else is loaded: the library takes values from there, too."""
    answered: Counter[int] = Counter()
    found = operations(schema)
    for operation in found:
        statuses = run(operation, CASES, 1)
        if "requestBody" in operation.definition.raw:
            answered += statuses
    assert min(answered[200], answered[400]) >= CASES
    assert len(found) >= 14


def test_a_status_that_is_not_documented_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openapi, "_WITH_BODY", ())
    (completions,) = [op for op in operations(served(tmp_path)) if op.path == "/v1/completions"]
    with pytest.raises(FailureGroup, match="Undocumented status code"):
        run(completions, CASES, 1)


def test_every_operation_says_what_it_may_answer(schema: Any) -> None:
    """Those with a body refuse one that cannot be read; those behind a key refuse who has none."""
    for operation in operations(schema):
        statuses = {int(status) for status in operation.definition.raw["responses"]}
        assert {200, 431, 500} <= statuses
        assert ("requestBody" in operation.definition.raw) == (statuses >= {408, 413, 415})
        assert (operation.path in openapi.OPEN_PATHS) == (401 not in statuses)
        assert 422 not in statuses
