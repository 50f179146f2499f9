"""Other engines' names for what /v1/admin/scale and the status document do: elastic expert parallelism.

There one number sizes both pools; here vLLM's `new_data_parallel_size` sizes the attention pool and SGLang's
`new_ep_size` the experts', each on its own. The answer does not wait for the workers: `is_scaling_elastic_ep` says
when they are there, and calls are served meanwhile, so there is nothing to drain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.v1.control_pb2 import ResizeRequest

from gateway.errors import invalid
from gateway.scaling import scale_request

PATHS = ("/scale_elastic_ep", "/is_scaling_elastic_ep")  # for operators, as /v1/admin

_SIZES = {"new_data_parallel_size": "attention", "new_ep_size": "experts"}
_DRAIN = "drain_timeout"  # vLLM's wait before it stops serving: ours goes on

FIELDS = {
    name: {"type": "integer", "minimum": 1, "maximum": 256, "description": f"workers of the pool of {pool}"}
    for name, pool in _SIZES.items()
} | {_DRAIN: {"description": "not needed: calls are served meanwhile"}}


def elastic_request(body: dict[str, Any]) -> ResizeRequest:
    """Raises BadRequest."""
    given = {name: size for name, size in body.items() if name != _DRAIN}
    for name, size in given.items():
        if name not in _SIZES:
            raise invalid(name, size, f"no such field; known: {', '.join([*_SIZES, _DRAIN])}")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
            raise invalid(name, size, "a whole number of workers, at least 1")
    if not given:
        raise invalid("new_data_parallel_size", None, "a whole number of workers, or new_ep_size in its place")
    return scale_request({_SIZES[name]: size for name, size in given.items()})


def elastic_state(document: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the pools are still on their way to what was last asked for."""
    pools, error = document["pools"], document["scaling_failed"]
    is_scaling = any(pool["ready"] != pool["wanted"] or pool["leaving"] for pool in pools.values())
    phase = "failed" if error and not is_scaling else "preparing" if is_scaling else "idle"
    epoch = document["epoch"]
    return {
        "is_scaling_elastic_ep": is_scaling,
        "phase": phase,
        "epoch": epoch["number"] if epoch else 0,
        "error": error or None,
        "requested_data_parallel_size": pools["attention"]["wanted"],
        "effective_data_parallel_size": pools["attention"]["ready"],
        "requested_ep_size": pools["expert"]["wanted"],
        "effective_ep_size": pools["expert"]["ready"],
    }
