"""The store of a Ray cluster: its internal key-value store, which outlives every actor.

One key per number taken, written only if absent: that write is what makes a number ours. One key per version of a
record, written before the older ones are removed. Keys are removed with the cluster that wrote them.
"""

from __future__ import annotations

from ray.experimental import internal_kv

_NAMESPACE = "expertmesh"
_RECORDS = "record:"
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

    def lasts(self) -> dict[str, int]:
        lasts: dict[str, int] = {}
        for key in internal_kv._internal_kv_list(self._prefix, namespace=_NAMESPACE):
            name, number = key.decode().removeprefix(self._prefix).rsplit("/", 1)
            if not name.startswith(_RECORDS):
                lasts[name] = max(lasts.get(name, 0), int(number))
        return lasts

    def write(self, name: str, version: int, text: str) -> None:
        older = [found for found in self._versions(name) if found < version]
        internal_kv._internal_kv_put(self._record(name, version), text.encode(), namespace=_NAMESPACE)
        for found in older:
            internal_kv._internal_kv_del(self._record(name, found), namespace=_NAMESPACE)

    def read(self, name: str) -> str | None:
        versions = self._versions(name)
        if not versions:
            return None
        text = internal_kv._internal_kv_get(self._record(name, max(versions)), namespace=_NAMESPACE)
        return None if text is None else text.decode()

    def _versions(self, name: str) -> list[int]:
        keys = internal_kv._internal_kv_list(f"{self._prefix}{_RECORDS}{name}/", namespace=_NAMESPACE)
        return [int(key.rsplit(b"/", 1)[1]) for key in keys]

    def _record(self, name: str, version: int) -> str:
        return f"{self._prefix}{_RECORDS}{name}/{version:0{_DIGITS}d}"

    def clear(self) -> None:
        """Remove every counter and record of this cluster."""
        internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)
