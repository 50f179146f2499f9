"""Promises of the row-invariant arithmetic: what rule 2 rests on."""

import pytest
import torch

from model import exact
from model.attention import TILE, PagedAttention, Stretch, first_tile_seen, query_tiles
from model.device import HOST


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (256, 512), (768, 768), (256, 3072)])
def test_a_row_has_the_same_bits_in_any_company(threads, dtype, outputs, inputs):
    """Alone, among others, at any place, beyond the longest rung: one row, one result."""
    torch.manual_seed(0)
    linear = exact.Linear(torch.randn(outputs, inputs).to(dtype), "exact")
    x = torch.randn(300, inputs).to(dtype)
    whole = linear(x)
    for at, count in ((0, 1), (7, 1), (3, 2), (11, 3), (50, 6), (100, 33), (0, 129), (299, 1)):
        assert torch.equal(linear(x[at : at + count]), whole[at : at + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (768, 768)])
def test_rows_within_many_are_computed_in_place_with_the_same_bits(threads, dtype, outputs, inputs):
    """Whatever stands behind them, be it not a number; more of them than a rung has, too."""
    linear = exact.Linear(torch.randn(outputs, inputs).to(dtype), "exact")
    x = torch.randn(200 + exact.ROWS_MAX, inputs).to(dtype)
    truth = linear(x)
    x[150:] = float("nan")
    for first, count in [(0, 1), (3, 5), (7, 9), (64, 33), (149, 1), (100, 50), (0, 150)]:
        assert torch.equal(linear.rows_of(x, first, count), truth[first : first + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_take_what_is_said_before_they_are_loaded(dtype):
    """Whatever dtype they were stored in."""
    kept = exact.Linear(torch.randn(8, 16).to(dtype), "exact").compute_dtype.itemsize
    assert exact.bytes_kept(8 * 16, dtype, HOST) == 8 * 16 * kept


def test_thread_count_leaves_no_trace():
    """A worker with two threads and one with one thread give the same bits."""
    torch.manual_seed(0)
    weight, x = torch.randn(512, 640), torch.randn(37, 640)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        out = exact.Linear(weight, "exact")(x)
        results.append(torch.cat((out, exact.silu(out), exact.log_softmax(out))))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_linear_agrees_with_the_library():
    """Padding changes no value beyond rounding."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 48), torch.randn(5, 48)
    torch.testing.assert_close(exact.Linear(weight, "exact")(x), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert exact.Linear(weight, "exact")(x[:0]).shape == (0, 64)


def test_elementwise_results_do_not_depend_on_vector_tails():
    """A scalar tail is computed by another routine than a vector: no element may meet it."""
    torch.manual_seed(0)
    x = torch.randn(40_000) * 4
    for fn in (exact.exp, exact.silu, exact.sigmoid, lambda v: exact.log(v.abs() + 1e-3)):
        whole = fn(x)
        for count in (1, 5, 15, 31, 33, 777):
            assert torch.equal(fn(x[:count]), whole[:count])


@pytest.mark.parametrize("width", [1, 2, 33, 768, 5000])
def test_a_tree_of_additions_sums_a_row_the_same_in_any_company(width):
    """What a GPU's rows are summed by."""
    torch.manual_seed(0)
    x = torch.randn(70, width)
    whole = exact.tree_sum(x)
    torch.testing.assert_close(whole, x.double().sum(-1).float(), rtol=1e-5, atol=1e-4)
    for at, count in ((0, 1), (3, 5), (69, 1)):
        assert torch.equal(exact.tree_sum(x[at : at + count]), whole[at : at + count])


def test_a_ladder_starts_where_rows_begin_to_agree():
    """Only multiples of the first rung remain, so that no rung in use went unprobed."""
    assert exact.rungs(4) == (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
    assert exact.padded(5, exact.rungs(4)) == 8


def test_a_shape_without_invariant_rows_is_refused_by_name():
    """Exact mode never guesses."""
    with pytest.raises(exact.NumericsError, match=r"weight 3x5.*accepted: --threads 1, or --numerics fast"):
        exact.smallest_first_rung(lambda m: m == 1, "weight 3x5")


# --- attention -------------------------------------------------------------------------------------


def _pool(lengths, heads, group, width, seed=0):
    """Random sequences in a pool whose blocks lie in no order."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(-(-n // TILE) for n in lengths)
    free = torch.randperm(num, generator=generator).tolist()
    keys, values = torch.zeros(num, heads, TILE, width), torch.zeros(num, heads, TILE, width)
    sequences = []
    for n in lengths:
        blocks = [free.pop() for _ in range(-(-n // TILE))]
        k, v = (torch.randn(n, heads, width, generator=generator) for _ in "kv")
        q = torch.randn(n, heads * group, width, generator=generator)
        for p in range(n):
            keys[blocks[p // TILE], :, p % TILE] = k[p]
            values[blocks[p // TILE], :, p % TILE] = v[p]
        sequences.append((q, k, v, blocks))
    return keys, values, sequences


def _expected(q, k, v, window, sinks):
    """Attention as the paper has it: q [T, N*G, D], k and v [T, N, D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), -1)
    share = scores.softmax(-1)[..., : len(q)]
    return (share @ v).transpose(0, 1).reshape(len(q), -1)


@pytest.mark.parametrize(
    ("window", "has_sinks"),
    [
        (None, False),
        (None, True),
        (1, True),
        (20, False),
        (TILE, True),
        (TILE + 1, False),
        (70, True),
        (500, False),
    ],
)
@pytest.mark.parametrize(("heads", "group", "width"), [(2, 3, 16), (1, 12, 64), (4, 1, 32)])
def test_attention_has_the_same_bits_for_prefill_chunks_and_decode(
    threads, heads, group, width, window, has_sinks
):
    """However a prompt is cut, and whoever decodes beside it, a position's row is the same; and it is right.

    A chunk is given only the blocks that its window still sees.
    """
    lengths = [5, TILE + 1, 2 * TILE, 170, 1]
    keys, values, sequences = _pool(lengths, heads, group, width)
    attend = PagedAttention(heads * group, heads, width, "exact", HOST)
    sinks = torch.linspace(-2, 3, heads * group) if has_sinks else None
    spans, at = [], 0
    for n, (_, _, _, blocks) in zip(lengths, sequences, strict=True):
        spans.append(Stretch(at, 0, n, 0, blocks))
        at += n
    everyone = torch.cat([s[0] for s in sequences])
    together = attend(everyone, keys, values, attend.lay_out(query_tiles(spans, window)), sinks)
    at = 0
    for n, (q, k, v, blocks) in zip(lengths, sequences, strict=True):
        expected = together[at : at + n]
        at += n
        for chunk in (1, 7, 100):
            for first in range(0, n, chunk if chunk > 1 else 29):
                count = min(chunk, n - first)
                tile = first_tile_seen(first, window)
                tiles = query_tiles([Stretch(0, first, count, tile, blocks[tile:])], window)
                got = attend(q[first : first + count], keys, values, attend.lay_out(tiles), sinks)
                assert torch.equal(got, expected[first : first + count])
        torch.testing.assert_close(expected, _expected(q, k, v, window, sinks), rtol=1e-4, atol=1e-5)


def test_what_lies_outside_a_window_is_not_computed():
    """Pairs of a query tile and a key tile that no token of it sees do not exist."""
    window, blocks = 40, list(range(10))
    for first, count in ((300, 1), (280, 20), (0, 320)):
        for tiles in query_tiles([Stretch(0, first, count, 0, blocks)], window):
            for query, tile in zip(tiles.pair_query.tolist(), tiles.pair_tile.tolist(), strict=True):
                seen = tiles.positions[query][:, None] - torch.arange(tile * TILE, (tile + 1) * TILE)
                assert ((seen >= 0) & (seen < window)).any()
    [tiles] = query_tiles([Stretch(0, 300, 1, 8, blocks[8:])], window)
    assert tiles.pair_block.tolist() == [8, 9]


@pytest.mark.parametrize("window", [None, 33])
def test_long_prompts_are_cut_into_slabs_of_the_same_bits(monkeypatch, window):
    """Bounding memory must not show."""
    keys, values, [(q, _, _, blocks)] = _pool([200], 2, 2, 16)
    attend = PagedAttention(4, 2, 16, "exact", HOST)
    tiles = query_tiles([Stretch(0, 0, 200, 0, blocks)], window)
    whole = attend(q, keys, values, attend.lay_out(tiles))
    monkeypatch.setattr("model.attention._PAIR_ELEMENTS_MAX", 5000)
    assert torch.equal(attend(q, keys, values, attend.lay_out(tiles)), whole)
