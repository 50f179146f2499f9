"""What can be wrong with a model on disk. Every message names the file, what it was and what is accepted."""

from __future__ import annotations

from pathlib import Path

VALUE_CHARS_MAX = 120


class ModelError(Exception):
    """Root of the errors of this folder: the checkpoint cannot be served as it is."""


class ConfigError(ModelError):
    """A field of config.json that we cannot honour."""

    def __init__(self, field: str, value: str, accepted: str, file: str = "config.json") -> None:
        """`value` as JSON text, or "absent"; `field` is dotted where nested."""
        super().__init__(f"{file}: field {field} is {shorten(value)}; accepted: {accepted}")
        self.field, self.value, self.accepted, self.file = field, value, accepted, file


class CheckpointError(ModelError):
    """A file of the checkpoint, or one tensor in it, that is missing or not as config.json says."""

    def __init__(self, file: Path, found: str, accepted: str, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor}" if tensor else f"{file}"
        super().__init__(f"{where} is {shorten(found)}; accepted: {accepted}")
        self.file, self.tensor, self.found, self.accepted = file, tensor, found, accepted


class DeviceUnavailable(ModelError):
    """The device that was asked for, why it cannot be had, and what is accepted."""


class NotEnoughMemory(ModelError):
    """What was wanted, how much it needs, how much there is."""


def shorten(text: str) -> str:
    """What a file said may be long; a message need not be."""
    return text if len(text) <= VALUE_CHARS_MAX else text[: VALUE_CHARS_MAX - 1] + "…"
