"""What travels in place of rows: fewer bytes out, or fewer rows back. Only where numerics are fast.

fp8: of each 128 elements of a row an FP8 code each and one float32 scale, amax / 448, as the family's checkpoints
have activations quantised (the released `config.json`: `fmt` e4m3, dynamic scheme, blocks of 128). Packed into
elements of the link's dtype, so a row stays a row to whoever copies, cuts or sends it. A group with an element
that is not finite is not finite when it comes out. sums: in place of a row for each route, the weighted sum of a
parcel's routes of each row. Legend: n rows · H hidden · G groups of 128, the last may be shorter · P width of a
packed row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from router.config import RowsSent

GROUP = 128
_CODE_MAX = 448.0  # the largest finite float8_e4m3fn
_SCALE_BYTES = 4
_SCALE_MIN = 2.0**-126  # below it a float32 loses bits, and may be zero


def sent_width(hidden: int, dtype: torch.dtype, rows: RowsSent) -> int:
    """P: how many elements of `dtype` a row takes on its way to the experts."""
    return hidden if rows == "plain" else -(-_packed_bytes(hidden) // dtype.itemsize)


def pack(rows: Tensor) -> Tensor:
    """[n, H] -> [n, P] of the same dtype, whose elements are no numbers."""
    num_rows, hidden = rows.shape
    groups = _groups(hidden)
    padded = F.pad(rows.float(), (0, groups * GROUP - hidden)).view(num_rows, groups, GROUP)
    amax = padded.abs().amax(-1, keepdim=True)  # [n, G, 1]
    scales = torch.where(amax == 0, 1.0, amax / _CODE_MAX).clamp_min(_SCALE_MIN)  # NaN stays NaN
    codes = (padded / scales).to(torch.float8_e4m3fn).view(num_rows, groups * GROUP)
    width = sent_width(hidden, rows.dtype, "fp8")
    packed = torch.zeros(num_rows, width * rows.dtype.itemsize, dtype=torch.uint8, device=rows.device)
    codes_at = _SCALE_BYTES * groups
    packed[:, :codes_at] = scales.view(num_rows, groups).view(torch.uint8)
    packed[:, codes_at : codes_at + hidden] = codes.view(torch.uint8)[:, :hidden]
    return packed.view(rows.dtype)


def unpack(packed: Tensor, hidden: int) -> Tensor:
    """[n, P] from `pack` -> [n, H] of the same dtype."""
    groups = _groups(hidden)
    raw = packed.contiguous().view(torch.uint8)  # [n, bytes]
    codes_at = _SCALE_BYTES * groups
    scales = _whole(raw[:, :codes_at]).view(torch.float32)  # [n, G]
    codes = _whole(raw[:, codes_at : codes_at + hidden]).view(torch.float8_e4m3fn).float()
    return (codes * scales.repeat_interleave(GROUP, 1)[:, :hidden]).to(packed.dtype)


def sums(rows: Tensor, weights: Tensor, route_rows: Tensor, num_rows: int) -> Tensor:
    """rows [r, H], weights [r] float32, route_rows [r] -> [n, H] of the rows' dtype: each of the n rows' weighted
    sum, in float32, in the order of the routes."""
    total = torch.zeros(num_rows, rows.shape[1], device=rows.device)
    total.index_add_(0, route_rows.to(rows.device), rows.float().mul_(weights.to(rows.device).unsqueeze(1)))
    return total.to(rows.dtype)


def _groups(hidden: int) -> int:
    return -(-hidden // GROUP)


def _packed_bytes(hidden: int) -> int:
    return _SCALE_BYTES * _groups(hidden) + hidden


def _whole(part: Tensor) -> Tensor:
    """A copy whose strides fit elements of any size; `contiguous` leaves them as they are where no row is."""
    return part.clone(memory_format=torch.contiguous_format)
