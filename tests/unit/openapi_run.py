"""Cases made from our own /openapi.json, sent to a gateway in this process, and what its answers must be.

`python -m tests.unit.openapi_run --cases 500` is what `make fuzz` runs of each endpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from expertmesh.v1 import control_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from gateway.server import create_app
from tests.unit.gateway_world import STATUS_DOCUMENT, card_of, state_of, write_checkpoint

CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
)
ENDLESS = ("/v1/admin/events",)
GOOD = {
    "prompt": st.sampled_from([[5, 6], "hello", ["a", "b"], [[7], [8, 9]]]),
    "messages": st.sampled_from([[{"role": "user", "content": "Hi"}]]),
    "input": st.sampled_from(["Hi", [{"role": "user", "content": "Hi"}]]),
    "tokens": st.lists(st.integers(0, 300), max_size=5),
}
"""What a schema cannot say: values that this checkpoint can read."""


def served(folder: Path) -> Any:
    """The schema of a gateway whose controller agrees to everything."""
    state, _ = state_of(card_of(write_checkpoint(folder)), n_max=4)

    async def status() -> dict[str, Any]:
        return STATUS_DOCUMENT

    async def resize(_asked: control_pb2.ResizeRequest) -> control_pb2.ResizeReply:
        return control_pb2.ResizeReply(json='{"pools": {}}')

    state.status, state.resize = status, resize
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(state))


def operations(schema: Any) -> list[Any]:
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if operation.path not in ENDLESS]


def run(operation: Any, cases: int, number: int) -> Counter[int]:
    """How often each status was answered. Raises what a check found."""
    answered: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy() | _bad(operation), data=st.data())
    def one(case: Any, data: Any) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # any but the served one is a 404, and nothing else is looked at
            kept = data.draw(st.sampled_from([0, 1, 3, 100]))
            case.body = dict(list(case.body.items())[:kept])
            wanted = [name for name in GOOD if name in properties]
            if wanted and data.draw(st.integers(0, 3)):
                name = wanted[0] if "messages" not in wanted else "messages"
                case.body = {**case.body, name: data.draw(GOOD[name])}
        response = case.call()
        answered[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    properties = _properties(operation)
    one()
    return answered


def _bad(operation: Any) -> Any:
    """Cases that the schema forbids, where it forbids any."""
    forbids = "requestBody" in operation.definition.raw or operation.definition.raw.get("parameters")
    return operation.as_strategy(generation_mode=GenerationMode.NEGATIVE) if forbids else st.nothing()


def _properties(operation: Any) -> dict[str, Any]:
    content = operation.definition.raw.get("requestBody", {}).get("content", {})
    properties: dict[str, Any] = content.get("application/json", {}).get("schema", {}).get("properties", {})
    return properties


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="of each endpoint (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for operation in operations(served(Path(folder))):
            answered = run(operation, arguments.cases, arguments.seed)
            told = ", ".join(f"{status}: {count}" for status, count in sorted(answered.items()))
            print(f"{operation.method.upper()} {operation.path}: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
