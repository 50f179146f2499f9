"""A byte-level BPE tokenizer with the family's added tokens, trained on text that every Python has.

The same Python version and vocabulary size give the same tokenizer; another Python ships other text, so token
ids below the added ones may differ there. Ids of added tokens depend on the vocabulary size alone: they are
its last ones, and every id of the vocabulary has a text. Beyond what is trained, ids have texts that no
input is cut into.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, FIM_PAD, ROLE, EOS, UNK, BOS = "]!p~[", "<fim_pad>", "]~b]", "[e~[", "]!d~[", "]~!b["
SPECIAL = (PAD, FIM_PAD, ROLE, EOS, UNK, BOS)
PLAIN = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
"""Added so that each is one token, but not special: skipping special tokens must leave them in the text."""

TOPICS_VOCAB_MAX = 8192
"""The language reference alone yields about 9,000 tokens; beyond this the library's source is read too."""

TRAINED_VOCAB_MAX = 32_768
"""About what the library's source yields."""

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def added_token_id(token: str, vocab_size: int) -> int:
    """The id that `write_tokenizer` gives to one of SPECIAL and PLAIN."""
    added = SPECIAL + PLAIN
    return vocab_size - len(added) + added.index(token)


def write_tokenizer(folder: Path, vocab_size: int, model_len_max: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; exactly vocab_size tokens."""
    size = vocab_size - len(SPECIAL) - len(PLAIN)
    tokenizer = _filled(_train(min(size, TRAINED_VOCAB_MAX)), size)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    assert tokenizer.token_to_id(EOS) == added_token_id(EOS, vocab_size), "added tokens come last, in order"
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_len_max,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / CHAT_TEMPLATE.name).write_bytes(CHAT_TEMPLATE.read_bytes())


def _train(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(size), trainer)
    if tokenizer.get_vocab_size() != size:
        # Only a Python without its documentation topics and library sources comes here.
        raise RuntimeError(f"this Python ships text for {tokenizer.get_vocab_size()} of {size} tokens")
    return tokenizer


def _filled(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """With words that no merge leads to, up to `size`."""
    trained = tokenizer.get_vocab_size()
    if trained == size:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {f"unused{number:06}": number for number in range(trained, size)}
    return Tokenizer.from_str(json.dumps(content))


def _corpus(size: int) -> Iterator[str]:
    yield from topics.values()
    if size > TOPICS_VOCAB_MAX:
        for source in sorted(Path(os.__file__).parent.glob("*.py")):
            yield source.read_text(encoding="utf-8")
