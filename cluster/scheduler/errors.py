"""What can go wrong at the scheduler's links.

SchedulerError
├── MalformedMessage   a peer said what cannot be: its stream is closed
└── AddressUnusable    our own address cannot be bound
"""

from __future__ import annotations


class SchedulerError(Exception):
    """Base of all errors that leave this folder."""


class MalformedMessage(SchedulerError):
    """Names the field, the value, and what is accepted."""


class AddressUnusable(SchedulerError):
    """Occupied, or not an address."""
