"""Sizes of memory as people write them, both ways."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `512MB`, `1.5g` or `1048576`. Raises ValueError naming what is accepted."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r}; accepted: a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, as 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_size_or_share(text: str) -> tuple[int, float]:
    """(bytes, 0) of a size, (0, share) of `0.5` or `50%`. Raises ValueError naming what is accepted."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%|(\d*\.\d+)", text.strip())
    if match is None:
        return parse_size(text), 0.0
    share = float(match[1]) / 100 if match[1] else float(match[2])
    if not 0 < share <= 1:
        raise ValueError(
            f"{text!r}; accepted: a share of what is free above 0 and up to 1.0 or 100%, or a size as 2GiB"
        )
    return 0, share


def show_size(size: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
