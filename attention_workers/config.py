"""What one attention worker is told at birth. Everything it learns later comes by plan or placement."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from attention_workers.microbatch_choice import MICROBATCHES_MAX


class AttentionConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    numerics: Literal["exact", "fast"] = "exact"
    """exact: logits do not depend on who else is in the batch, on chunking or placement (rule 2)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: what the checkpoint says."""

    weights: Literal["auto", "dequantised", "fp8"] = "auto"
    """How FP8 weights are held. fp8: as stored, half of bfloat16's memory and slower; the answers are the same.
    auto: dequantised if that fits into memory."""

    threads: int = Field(1, ge=1, le=256)
    """Compute threads. One per worker and more workers beats more threads on small machines."""

    kv_bytes: int = Field(0, ge=0)
    """Memory for keys and values; 0: kv_share of what is free."""

    kv_share: float = Field(0.0, ge=0, le=1)
    """Their share of kv_free_bytes, where kv_bytes is 0. 0: a quarter, 4 GiB at most; of a GPU's, four fifths."""

    kv_free_bytes: int = Field(0, ge=0)
    """What counts as free for them, of one worker. 0: on one host without GPUs its memory without all weights and
    processes, divided among the attention workers before any starts; elsewhere what a worker finds when its
    weights are loaded."""

    kv_sequence_tokens: int = Field(1024, ge=1)
    """Hybrids: the length of sequence for which the memory is divided between full and sliding layers."""

    prefix_cache: bool = True
    """Whether keys and values stay where they are after their sequence has ended, until the room is wanted, so
    that a prompt that begins alike need not compute them again."""

    model_len_max: int = Field(0, ge=0)
    """Longest prompt and answer together, in tokens; 0: what the checkpoint allows."""

    sequences_max: int = Field(256, ge=1, le=4096)
    """Sequences that run at once on this worker."""

    microbatches: int | Literal["auto"] = "auto"
    """Slices of a step in flight at once, 1 to 4. auto: for each kind of step what was measured to be best."""

    experts_wait_s: float = Field(30.0, gt=0)
    """How long a step waits for an expert that no live worker holds. Then its sequences are given back, and
    queue at the scheduler until experts are there again."""

    token_backlog_max: int = Field(1024, ge=1)
    """Token batches waiting for one gateway before its sequences are given back to it."""

    @field_validator("microbatches", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if number == "auto" or (type(number) is int and 1 <= number <= MICROBATCHES_MAX):
            return number
        raise ValueError(f"accepted: auto, or 1 to {MICROBATCHES_MAX}")

    @model_validator(mode="after")
    def _one_amount(self) -> AttentionConfig:
        if self.kv_bytes and self.kv_share:
            raise ValueError(
                f"kv_bytes {self.kv_bytes} and kv_share {self.kv_share:g} are two amounts: one of them must be 0, "
                "as --kv-memory sees to"
            )
        return self
