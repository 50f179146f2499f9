"""What one expert worker is told at birth. Which experts it holds comes by placement."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ExpertConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    numerics: Literal["exact", "fast"] = "exact"
    """exact: a row's result does not depend on the rows beside it (rule 2)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: what the checkpoint says."""

    weights: Literal["auto", "dequantised", "fp8"] = "auto"
    """How FP8 weights are held. fp8: as stored, half of bfloat16's memory and slower; the answers are the same.
    auto: dequantised if that fits into memory."""

    threads: int = Field(default=1, ge=1, le=256)
    """Compute threads. One per worker and more workers beats more threads on small machines."""

    batch_rows_max: int = Field(default=4096, ge=1)
    """Routes joined into one computation of a layer."""

    batch_parcels_max: int = Field(default=64, ge=1)
    """Parcels in hand at most, waiting to be joined. What more there is waits in its sender's link."""

    load_bytes_per_s: int = Field(default=256 << 20, ge=0)
    """Of weights, as stored, loaded beside the work when nothing waits for them: while the pool is rebalanced, or
    workers come and go. 0: as fast as it goes. What waits for a lost worker's experts is never slowed."""

    join_wait_s: float = Field(default=0.002, ge=0, le=0.1)
    """How long at most a parcel is held for another attention worker that is expected to ask for the same layer;
    0: only what waits already is joined. Longer joins more, and lets a fast attention worker wait for a slow one
    at each layer. On two busy cores it is hard to tell from 0 (docs/architecture.md)."""
