"""Answers held to grammars: valid where they end, and the same wherever and with whomever they are computed."""

import dataclasses
import json
import random

import jsonschema
import pytest
from tokenizers import Tokenizer

from attention_workers.step import FinishReason, Grammar
from gateway import grammar as grammars
from gateway.tokens import Tokens
from model.checkpoint import Checkpoint
from model.synthetic import make_checkpoint
from model.synthetic_tokenizer import EOS, added_token_id
from tests.equivalence.local_cluster import LocalCluster, request
from tests.equivalence.schemas import bounded_schema

SCHEMAS = 100
MAX_TOKENS = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammars") / "tiny"
    make_checkpoint("tiny", path, seed=3)
    return Checkpoint.open(path)


def held(checkpoint, schema):
    part = grammars.Part("schema", {"json_schema": grammars.with_options(schema, "schema")})
    return Grammar(grammars.whole([part], after_thought=False), (eos(checkpoint),))


def eos(checkpoint):
    return added_token_id(EOS, checkpoint.config.vocab_size)


def structured(checkpoint, seed, **fields):
    start = request(
        f"r{seed}", [5 + seed % 50, 7, 9], max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, arrival=seed
    )
    schema = bounded_schema(random.Random(seed))
    return dataclasses.replace(
        start, stop_token_ids=frozenset({eos(checkpoint)}), grammar=held(checkpoint, schema), **fields
    )


def valid_answers(checkpoint, seeds, at_once=32):
    """How many ended; each of those is valid."""
    tokens = Tokens(Tokenizer.from_file(str(checkpoint.path / "tokenizer.json")))
    num_ended = 0
    with LocalCluster(checkpoint, blocks=600, model_len=512) as cluster:
        for first in range(seeds.start, seeds.stop, at_once):
            several = range(first, min(first + at_once, seeds.stop))
            answers = cluster.run([structured(checkpoint, seed) for seed in several])
            for seed in several:
                found = answers[f"r{seed}"].tokens
                if found[-1] != eos(checkpoint):
                    assert len(found) == MAX_TOKENS
                    continue
                num_ended += 1
                value = json.loads(tokens.decode(found[:-1]))
                jsonschema.Draft202012Validator(bounded_schema(random.Random(seed))).validate(value)
    return num_ended


def test_random_schemas_are_kept_by_a_random_model(checkpoint, pytestconfig, tmp_path):
    """A share of the 500 that `make soak` has the demo model keep to."""
    count = pytestconfig.getoption("schemas") or SCHEMAS
    if count != SCHEMAS:
        make_checkpoint("demo", tmp_path / "demo", seed=1)
        checkpoint = Checkpoint.open(tmp_path / "demo")
    num_ended = valid_answers(checkpoint, range(count))
    print(f"{num_ended} of {count} answers ended, all of them valid")
    assert num_ended >= 0.9 * count


def test_company_pauses_and_resumes_leave_no_trace(checkpoint):
    """Of grammars on others, nor of others on them. The longest of some answers is looked at."""
    plain = request("plain", range(20, 60), max_tokens=40, temperature=1.0, seed=5)
    with LocalCluster(checkpoint) as cluster:
        answers = cluster.run([structured(checkpoint, seed) for seed in range(12)])
        alone = cluster.run([plain])["plain"]
    seed = max(range(12), key=lambda one: len(answers[f"r{one}"].tokens))
    mine, whole = structured(checkpoint, seed), answers[f"r{seed}"]
    assert len(whole.tokens) > 20
    crowd = [request(f"s{i}", range(20, 60 + i), max_tokens=40, temperature=1.0, arrival=i) for i in range(6)]
    with LocalCluster(checkpoint, experts=2, blocks=10) as cluster:
        together = cluster.run([mine, plain, *crowd])
    assert together[f"r{seed}"] == whole
    assert together["plain"] == alone
    for kept in (1, 7, len(whole.tokens) - 1):
        with LocalCluster(checkpoint) as cluster:
            result = cluster.order(0, [dataclasses.replace(mine, accepted=tuple(whole.tokens[:kept]))])
            while cluster.workers[0].book.sequences:
                cluster.workers[0].step(result)
        assert [token for delta in result.deltas["gw"] for token in delta.tokens] == whole.tokens[kept:]


def test_a_grammar_in_trouble_fails_its_own_sequence(checkpoint):
    plain = request("plain", range(20, 60), max_tokens=5)
    broken = dataclasses.replace(plain, attempt=dataclasses.replace(plain.attempt, request_id="broken"),
                                 grammar=Grammar("start: nowhere", (eos(checkpoint),)))  # fmt: skip
    with LocalCluster(checkpoint) as cluster:
        result = cluster.order(0, [broken, plain])
        while cluster.workers[0].book.sequences:
            cluster.workers[0].step(result)
    ends = {end.attempt.request_id: end for end in result.completions}
    assert ends["broken"].reason is FinishReason.FAILED
    assert "cannot be compiled" in ends["broken"].detail
    assert ends["plain"].reason is FinishReason.LENGTH


def test_other_rules_give_way_where_they_leave_nothing_of_the_grammar(checkpoint):
    """`min_tokens` would hold back the end, and allowed tokens the beginning: the grammar alone is kept to."""
    mine = structured(checkpoint, 0)
    mine = dataclasses.replace(
        mine,
        grammar=held(checkpoint, {"const": True}),
        min_tokens=50,
        sampling=dataclasses.replace(mine.sampling, allowed_token_ids=(3, eos(checkpoint))),
    )
    with LocalCluster(checkpoint) as cluster:
        found = cluster.run([mine])["r0"].tokens
    tokens = Tokens(Tokenizer.from_file(str(checkpoint.path / "tokenizer.json")))
    assert (tokens.decode(found[:-1]), found[-1]) == ("true", eos(checkpoint))
