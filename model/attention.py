"""Grouped-query attention over paged keys and values, whole or in a window, the same bits for prefill and decode.

Keys come in tiles of `TILE` tokens at absolute positions, one KV block each. Every (query tile, key tile)
pair is one product of fixed inner and outer size; a row's maximum is exact in any order; its sums are folded
as a binary tree over absolute tile numbers, in which a tile that is masked or absent adds exactly zero. So
neither the chunking of a prompt nor the batch shows in a row's bits (DESIGN rule 2).

In a window of W tokens the token at position i sees those at j with 0 <= i - j < W. Tiles that no token of a
query tile sees are neither held nor computed; the tree starts where the window does and adds up the same, for
what is left out of it was zero. A sink is a logit of each query head beside those of its keys, without a value:
its share joins the sum after the tree.

Legend: M query tiles · C tokens and R rows (C x G, padded) of a query tile · P pairs · W leaves of a tree ·
N kv heads · G query heads per kv head · D head width · B blocks of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import exact
from model.batched import Batched
from model.device import HOST

TILE = 32
"""Tokens of a key tile and of a KV block. Part of the definition of exact results: not a setting."""

QUERY_TOKENS = 16
"""Prompt tokens of one sequence that share a query tile."""

_PAIR_ELEMENTS_MAX = 1 << 23
"""Elements of the largest temporary of one slab of pairs: bounds memory on long prompts."""


class Stretch(NamedTuple):
    """Consecutive tokens of one sequence in a microbatch, and where its keys lie."""

    token: int  # first, in the microbatch
    position: int  # of that token in its sequence
    num_tokens: int
    first_tile: int  # key tile number of blocks[0]: those before it are held no more
    blocks: list[int]


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles of equal height, and the key tiles each may see.

    `tokens` and `positions` name, for each row of a tile, the token of the microbatch and its position in its
    sequence; unused rows repeat the last, and are not in `used`.
    """

    tokens: Tensor  # [M, C] int64: token of the microbatch
    positions: Tensor  # [M, C] int64
    used: Tensor  # [M, C] bool
    pair_query: Tensor  # [P] int64, ascending
    pair_tile: Tensor  # [P] int64: absolute key tile number, ascending within a query tile
    pair_block: Tensor  # [P] int64: where it lies in the pool
    leaves: Tensor  # [M, W] int64: which pair is leaf w of a query tile's tree; P where none is
    window: int | None  # tokens that a token sees, itself included; None: all before it

    def to(self, device: torch.device) -> QueryTiles:
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if name != "window"}
        return replace(self, **tensors)


def query_tiles(stretches: list[Stretch], window: int | None = None) -> list[QueryTiles]:
    """Cut stretches into query tiles, each with the key tiles that its tokens see.

    Single tokens make one group, longer stretches another, so that decoding pays for no empty rows.
    """
    singles = [s for s in stretches if s.num_tokens == 1]
    longer = [
        s._replace(token=s.token + at, position=s.position + at, num_tokens=min(QUERY_TOKENS, s.num_tokens - at))
        for s in stretches
        if s.num_tokens > 1
        for at in range(0, s.num_tokens, QUERY_TOKENS)
    ]
    return [_group(group, height, window) for group, height in ((singles, 1), (longer, QUERY_TOKENS)) if group]


def first_tile_seen(position: int, window: int | None) -> int:
    """The number of the first key tile that a token at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // TILE


def _group(cuts: list[Stretch], height: int, window: int | None) -> QueryTiles:
    tokens, positions, used = [], [], []
    query: list[int] = []
    tile: list[int] = []
    block: list[int] = []
    for m, (token, position, count, first_tile, blocks) in enumerate(cuts):
        offsets = [min(i, count - 1) for i in range(height)]
        tokens.append([token + i for i in offsets])
        positions.append([position + i for i in offsets])
        used.append([i < count for i in range(height)])
        seen = range(first_tile_seen(position, window), (position + count - 1) // TILE + 1)
        assert seen.start >= first_tile, "a tile was given back that is still seen"
        query += [m] * len(seen)
        tile += seen
        block += blocks[seen.start - first_tile : seen.stop - first_tile]
    rows = (_on_host(tokens), _on_host(positions), _on_host(used))
    pairs = (_on_host(query), _on_host(tile), _on_host(block))
    return QueryTiles(*rows, *pairs, _leaves(pairs[0], pairs[1]), window)


def _on_host(values: list[Any]) -> Tensor:
    return torch.tensor(values, device=HOST)


class PagedAttention:
    """softmax(q k^T / sqrt(D) + causal, within the tiles' window) v for one layer's worth of heads, on one device.

    Tiles are cut on the host, where lists are; `lay_out` brings them to the device, once for all layers of a type.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, numerics: exact.Numerics, device: torch.device
    ) -> None:
        self.kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self._device = device
        self._product = Batched(((head_dim, TILE), (TILE, head_dim)), numerics, device)
        if numerics == "exact":
            exact.probe_row_sum([TILE], device)

    def lay_out(self, groups: list[QueryTiles]) -> list[QueryTiles]:
        """Cut so that no temporary outgrows its bound, and moved from the host to the device."""
        return [slab.to(self._device) for tiles in groups for slab in self._slabs(tiles)]

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, slabs: list[QueryTiles], sinks: Tensor | None = None
    ) -> Tensor:
        """q [T, N*G, D]; keys, values [B, N, TILE, D]; sinks [N*G] float32 -> [T, N*G*D] in q's dtype.

        `slabs`: laid out.
        """
        out = torch.empty_like(q)
        for slab in slabs:
            self._attend(q, keys, values, slab, sinks, out)
        return out.view(len(q), -1)

    def _height(self, tokens: int) -> int:
        return self._product.height(tokens * self.group)

    def _slabs(self, tiles: QueryTiles) -> list[QueryTiles]:
        """Split by query tile, on the host."""
        num, tokens = tiles.tokens.shape
        per_pair = self.kv_heads * max(self._height(tokens), TILE) * max(self.head_dim, TILE)
        counts = torch.bincount(tiles.pair_query, minlength=num).tolist()
        if sum(counts) * per_pair <= _PAIR_ELEMENTS_MAX:
            return [tiles]
        slabs, first, pairs = [], 0, 0
        for m, count in enumerate([*counts, None]):
            if count is None or (m > first and (pairs + count) * per_pair > _PAIR_ELEMENTS_MAX):
                slabs.append(_cut(tiles, first, m))
                first, pairs = m, 0
            pairs += count or 0
        return slabs

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, tiles: QueryTiles, sinks: Tensor | None, out: Tensor
    ) -> None:
        num, tokens = tiles.tokens.shape
        rows = tokens * self.group
        height = self._height(tokens)
        n, g, d = self.kv_heads, self.group, self.head_dim
        grouped = q[tiles.tokens].float().view(num, tokens, n, g, d).permute(0, 2, 1, 3, 4)
        queries = F.pad(grouped.reshape(num, n, rows, d) * self.scale, (0, 0, 0, height - rows))  # [M, N, R, D]
        row = torch.arange(height, device=q.device)
        token = (row // g).clamp(max=tokens - 1)  # [R]: rows beyond the last repeat it
        position = tiles.positions[:, token]  # [M, R]

        pairs = len(tiles.pair_query)
        k = keys[tiles.pair_block].float().view(pairs * n, TILE, d)
        queries = queries[tiles.pair_query].reshape(pairs * n, height, d)
        scores = self._product(queries, k.transpose(1, 2))
        scores = scores.view(pairs, n, height, TILE)
        key_position = (tiles.pair_tile[:, None] * TILE + torch.arange(TILE, device=q.device))[
            :, None, :
        ]  # [P, 1, TILE]
        last_seen = position[tiles.pair_query][:, :, None]  # [P, R, 1]
        hidden = key_position > last_seen  # [P, R, TILE]
        if tiles.window is not None:
            hidden |= key_position <= last_seen - tiles.window
        scores.masked_fill_(hidden[:, None], float("-inf"))

        highest = _gather(scores.amax(-1), tiles.leaves, float("-inf")).amax(1)  # [M, N, R]
        if sinks is not None:
            sink = sinks.view(n, g)[:, row % g]  # [N, R]
            highest = torch.maximum(highest, sink)
        probs = exact.exp(scores - highest[tiles.pair_query][..., None])
        v = values[tiles.pair_block].float().view(pairs * n, TILE, d)
        weighted = self._product(probs.view(pairs * n, height, TILE), v).view(pairs, n, height, d)
        total = _fold(_gather(exact.row_sum(probs), tiles.leaves, 0.0))  # [M, N, R]
        if sinks is not None:
            total = total + exact.exp(sink - highest)
        mixed = _fold(_gather(weighted, tiles.leaves, 0.0)) / total[..., None]  # [M, N, R, D]

        mixed = mixed[:, :, :rows].view(num, n, tokens, g, d).permute(0, 2, 1, 3, 4).reshape(num, tokens, n * g, d)
        out[tiles.tokens[tiles.used]] = mixed[tiles.used].to(out.dtype)


def _cut(tiles: QueryTiles, first: int, end: int) -> QueryTiles:
    mine = (tiles.pair_query >= first) & (tiles.pair_query < end)
    query, tile = tiles.pair_query[mine] - first, tiles.pair_tile[mine]
    return QueryTiles(
        tiles.tokens[first:end],
        tiles.positions[first:end],
        tiles.used[first:end],
        query,
        tile,
        tiles.pair_block[mine],
        _leaves(query, tile),
        tiles.window,
    )


def _leaves(pair_query: Tensor, pair_tile: Tensor) -> Tensor:
    """Where pairs stand in the trees over absolute tile numbers; W is a power of two.

    The leaves are those below one or two neighbouring nodes that cover all tiles present: above them all else
    is zero, so their sum is the tree's.
    """
    count = torch.bincount(pair_query)
    end = count.cumsum(0)
    first, last = pair_tile[end - count], pair_tile[end - 1]  # [M]
    level = 0
    while int(((last >> level) - (first >> level)).max()) > 1:
        level += 1
    node = first >> level
    width = (1 + int(((last >> level) - node).max())) << level
    leaves = torch.full((len(count), width), len(pair_query), device=HOST)
    leaves[pair_query, pair_tile - (node << level)[pair_query]] = torch.arange(len(pair_query), device=HOST)
    return leaves


def _gather(x: Tensor, leaves: Tensor, absent: float) -> Tensor:
    """x [P, ...] -> [M, W, ...], `absent` where a query tile has no such key tile."""
    return torch.cat((x, torch.full_like(x[:1], absent)))[leaves]


def _fold(x: Tensor) -> Tensor:
    """[M, W, ...] -> [M, ...]: a sum as a binary tree over absolute tile numbers."""
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    return x[:, 0]
