"""Promises of the row-invariant arithmetic: what rule 2 rests on."""

import pytest
import torch

from model import exact
from model.attention import TILE, PagedAttention, query_tiles


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 40), (256, 512), (768, 768)])
def test_a_row_has_the_same_bits_in_any_company(threads, dtype, outputs, inputs):
    """Alone, among others, at any place, beyond the longest rung: one row, one result."""
    torch.manual_seed(0)
    linear = exact.Linear(torch.randn(outputs, inputs).to(dtype), "exact")
    x = torch.randn(300, inputs).to(dtype)
    whole = linear(x)
    for at, count in ((0, 1), (7, 1), (3, 2), (11, 3), (50, 6), (100, 33), (0, 129), (299, 1)):
        assert torch.equal(linear(x[at : at + count]), whole[at : at + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_take_what_is_said_before_they_are_loaded(dtype):
    """Whatever dtype they were stored in."""
    kept = exact.Linear(torch.randn(8, 16).to(dtype), "exact").compute_dtype.itemsize
    assert exact.bytes_kept(8 * 16, dtype) == 8 * 16 * kept


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


@pytest.mark.parametrize(("heads", "group", "width"), [(2, 3, 16), (1, 12, 64), (4, 1, 32)])
def test_attention_has_the_same_bits_for_prefill_chunks_and_decode(threads, heads, group, width):
    """However a prompt is cut, and whoever decodes beside it, a position's row is the same."""
    lengths = [5, TILE + 1, 2 * TILE, 130, 1]
    keys, values, sequences = _pool(lengths, heads, group, width)
    attend = PagedAttention(heads * group, heads, width, "exact")
    spans, at = [], 0
    for n, (_, _, _, blocks) in zip(lengths, sequences, strict=True):
        spans.append((at, 0, n, blocks))
        at += n
    together = attend(torch.cat([s[0] for s in sequences]), keys, values, query_tiles(spans))
    at = 0
    for n, (q, k, v, blocks) in zip(lengths, sequences, strict=True):
        expected = together[at : at + n]
        at += n
        for chunk in (1, 7, 100):
            for first in range(0, n, chunk if chunk > 1 else 29):
                count = min(chunk, n - first)
                tiles = query_tiles([(0, first, count, blocks)])
                got = attend(q[first : first + count], keys, values, tiles)
                assert torch.equal(got, expected[first : first + count])
        wide = [x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v)]
        library = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), *wide, is_causal=True)
        torch.testing.assert_close(expected, library.transpose(0, 1).reshape(n, -1), rtol=1e-4, atol=1e-5)


def test_long_prompts_are_cut_into_slabs_of_the_same_bits(monkeypatch):
    """Bounding memory must not show."""
    keys, values, [(q, _, _, blocks)] = _pool([200], 2, 2, 16)
    attend = PagedAttention(4, 2, 16, "exact")
    whole = attend(q, keys, values, query_tiles([(0, 0, 200, blocks)]))
    monkeypatch.setattr("model.attention._PAIR_ELEMENTS_MAX", 5000)
    assert torch.equal(attend(q, keys, values, query_tiles([(0, 0, 200, blocks)])), whole)
