"""Which expert worker holds which expert of which layer: an immutable, versioned table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class EpochId:
    """The version of a placement: the controller's term, then a count within it."""

    term: int
    number: int


@dataclass(frozen=True, order=True)
class Member:
    """One life of one process: a higher incarnation of the same id supersedes a lower one."""

    id: str
    incarnation: int
