"""The benchmark of the prefix cache measures what it says: against naive counts, on a small made-up trace."""

import random

from benchmarks.curves import Curve, svg
from benchmarks.prefix_cache import Request, book_of, cached, ideal


def trace(seed=0, num_talks=12):
    """Conversations whose turns begin with all of the turn before but its last, cut block."""
    rng, names, requests = random.Random(seed), iter(range(10**6)), []
    talks = [[0, 1] for _ in range(num_talks)]
    for _ in range(60):
        talk = rng.choice(talks)
        talk += [next(names) + 2 for _ in range(rng.randint(1, 3))]
        length = 512 * len(talk) + rng.randint(1, 511)
        requests.append(Request(length, (*talk, next(names) + 2)))
    return requests


def naive(requests, block_tokens=32):
    """By comparing prompts, token by token."""
    total, prompts = 0, []
    for request in requests:
        prompt = request.prompt
        best = 0
        for other in prompts:
            length = 0
            while length < min(len(prompt) - 1, len(other)) and prompt[length] == other[length]:
                length += 1
            best = max(best, length)
        total += best // block_tokens * block_tokens
        prompts.append(prompt)
    return total


def test_the_ideal_is_what_comparing_prompts_gives():
    requests = trace(num_talks=4)[:25]
    assert ideal(requests) == naive(requests)


def test_with_ample_memory_the_book_has_what_the_ideal_has_and_less_with_less():
    """Full layers and hybrids; never more than the ideal."""
    requests = trace()
    best = ideal(requests)
    for window in (None, 512):
        shares = [cached(book_of(tokens, window), requests) / best for tokens in (16_000, 64_000, 10**6)]
        assert shares == sorted(shares)
        assert shares[0] < 0.8
        assert shares[-1] == 1.0


def test_a_curve_is_drawn_within_its_axes():
    drawn = svg([Curve("a < b", [(0.25, 0.1), (1, 0.3), (4, 0.4)])], "x", "y", 0.41)
    assert drawn.startswith("<svg")
    assert "a &lt; b" in drawn
    assert drawn.count("<circle") == 3
    places = [tuple(map(float, p.split(","))) for p in drawn.split('points="')[1].split('"')[0].split()]
    assert places == sorted(places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)
