"""The store of a Ray cluster: its internal key-value store, which outlives every actor.

One key per number taken, written only if absent: that write is what makes a number ours. Keys are removed with
the cluster that wrote them.
"""

from __future__ import annotations

from ray.experimental import internal_kv

_NAMESPACE = "expertmesh"
_DIGITS = 12  # padded, so that the highest key is the highest number


class RayStore:
    """Needs an initialised Ray. `cluster_id` keeps the counters of two clusters on one Ray apart."""

    def __init__(self, cluster_id: str) -> None:
        self._prefix = f"{cluster_id}/"

    def claim(self, name: str, number: int) -> bool:
        key = f"{self._prefix}{name}/{number:0{_DIGITS}d}"
        existed = internal_kv._internal_kv_put(key, b"taken", overwrite=False, namespace=_NAMESPACE)
        return not existed

    def last(self, name: str) -> int:
        keys = internal_kv._internal_kv_list(f"{self._prefix}{name}/", namespace=_NAMESPACE)
        return max((int(key.rsplit(b"/", 1)[1]) for key in keys), default=0)

    def clear(self) -> None:
        """Remove every counter of this cluster."""
        internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)
