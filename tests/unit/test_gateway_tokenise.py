"""/tokenize and /detokenize in vLLM's shape: what the generating endpoints would see, and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.config import GatewayConfig
from gateway.model_card import ModelCard
from gateway.server import create_app
from gateway.validate import Validator
from tests.unit.gateway_world import card_of, state_of, tokenizer_json, write_checkpoint

TOKENIZER = Tokenizer.from_str(tokenizer_json())
CHAT = [{"role": "user", "content": "Grüße 🙂"}]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    return card_of(write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


async def post(card: ModelCard, path: str, body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(state_of(card)[0]))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(path, json=body)


async def test_a_prompts_tokens_are_what_a_completion_would_see(card: ModelCard) -> None:
    body = {"model": "tiny", "prompt": "<think>Grüße 🙂", "return_token_strs": True}
    answer = (await post(card, "/tokenize", body)).json()
    expected = TOKENIZER.encode("<think>Grüße 🙂", add_special_tokens=False)
    assert answer == {
        "count": len(expected.ids),
        "max_model_len": 256,
        "tokens": expected.ids,
        "token_strs": expected.tokens,
    }
    plain = (await post(card, "/tokenize", {"prompt": "", "add_special_tokens": True})).json()
    assert plain == {"count": 0, "max_model_len": 256, "tokens": [], "token_strs": None}


async def test_messages_tokens_are_what_a_chat_would_see(card: ModelCard) -> None:
    answer = (await post(card, "/tokenize", {"messages": CHAT})).json()
    prompt = Validator(card, GatewayConfig(), 256).chat({"messages": CHAT}).requests[0].prompt
    assert answer["tokens"] == list(prompt)
    assert (await post(card, "/detokenize", {"tokens": answer["tokens"]})).json() == {
        "prompt": "]~!b[]~b]user\nGrüße 🙂[e~[\n]~b]ai"
    }


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=20))
def test_text_is_what_the_tokenizer_makes_of_all_at_once(card: ModelCard, ids: list[int]) -> None:
    """Special tokens by name; bytes that are no text are U+FFFD."""
    answer = Validator(card, GatewayConfig(), 256).detokenised({"tokens": ids})
    assert answer == {"prompt": TOKENIZER.decode(ids, skip_special_tokens=False)}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [1]}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [1, 10**6]}, "tokens[1]"),
    ],
)
async def test_what_is_wrong_is_named(card: ModelCard, path: str, body: Any, param: str) -> None:
    response = await post(card, path, body)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


async def test_a_checkpoint_without_a_tokenizer_refuses_both_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = await post(card_of(tmp_path), path, body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_tokenizer")
        assert "this checkpoint has no tokenizer.json" in response.json()["error"]["message"]
