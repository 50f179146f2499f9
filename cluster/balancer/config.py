"""What the balancer is told: how much it may do, and when it is worth it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BalancerConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    spare_slots: int = Field(default=0, ge=0, le=256)
    """Experts that each expert worker may hold of each layer beyond its even share of all replicas: room for
    copies of the busiest ones. They take memory once they are used."""

    moves_max: int = Field(default=64, ge=1, le=1 << 20)
    """Experts loaded at most by one rebalancing. Until it is done, workers hold them beside what they replace."""

    slack: float = Field(default=0.03, ge=0, le=1)
    """A layer whose busiest worker does at most so much more than the mean of all is left alone."""

    gain_min: float = Field(default=0.05, gt=0, le=1)
    """Of the time a perfectly balanced pool takes: what a rebalancing must gain, else nothing is moved."""

    load_half_life_s: float = Field(default=300.0, gt=0)
    """Load counts half when it is so old."""

    rows_per_read: float = Field(default=32.0, gt=0)
    """Rows computed in the time that reading one expert's weights takes: what a row weighs in an expert's load."""
