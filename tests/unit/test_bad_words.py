"""Promises of bad words: only what is generated counts, and only a word's last token is ruled out."""

from hypothesis import given
from hypothesis import strategies as st

from attention_workers import bad_words

TOKENS = st.integers(0, 2)


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=6), st.lists(TOKENS, max_size=4),
       st.lists(TOKENS, max_size=12))  # fmt: skip
def test_what_is_ruled_out_is_what_would_end_an_answer_in_a_bad_word(words, prompt, generated):
    found = bad_words.completions(words, [*prompt, *generated], len(prompt))
    for token in range(3):
        is_bad = any(tuple([*generated, token][-len(word) :]) == word for word in words)
        assert (token in found) == is_bad


def test_the_prompt_begins_no_word():
    assert bad_words.completions([(1, 2, 3)], [1, 2], 2) == []
    assert bad_words.completions([(1, 2, 3)], [1, 2], 0) == [3]
