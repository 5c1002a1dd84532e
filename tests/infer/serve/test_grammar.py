"""Texts drawn uniformly from what a grammar allows satisfy the grammar, for two kinds of tokenizers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from infer.constraint import Constraint
from infer.grammar import MOST_CHARACTERS, Grammars
from model.errors import InputError
from model.tokenizer import load_tokenizer
from model.tokenizer.token_bytes import token_bytes

TEXT = 'Ünïcödé 日本 🙂\n\t“quoted” {"a": [1, 2]}'


@pytest.fixture(scope="module")
def sentencepiece(data):
    return load_tokenizer(data)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte-level")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|turn|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), TEXT * 9], trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return load_tokenizer(folder)


@pytest.fixture(params=["sentencepiece", "byte_level"], scope="module")
def tokenizer(request):
    return request.getfixturevalue(request.param)


def drawn(grammars: Grammars, constraint: Constraint, pieces: list[bytes], generator, most: int = 3000) -> str | None:
    """Return a text of tokens drawn uniformly; None if it does not end within `most` tokens."""
    written = b""
    for _ in range(most):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: grammars.vocab_size]
        allowed = np.flatnonzero(bits)
        assert len(allowed), f"nothing may follow {written!r}"
        if constraint.finished:
            assert set(allowed) <= set(grammars.end_ids)
        token = int(generator.choice(allowed))
        constraint.accept(token)
        if token in grammars.end_ids:
            assert constraint.finished
            return written.decode()
        assert pieces[token], "a token without text was allowed"
        written += pieces[token]
    return None


def random_schema(generator: np.random.Generator, depth: int = 0) -> dict:
    """Return a schema with finitely many texts."""
    kinds = ["string", "integer", "enum", "boolean", "null", "const", "pattern"]
    kind = generator.choice(kinds + ["object", "array", "anyOf"] * 2 * (depth < 3))
    few = int(generator.integers(1, 4))
    if kind == "string":
        return {"type": "string", "maxLength": few * 3}
    if kind == "integer":
        return {"type": "integer", "minimum": -few, "maximum": 10 * few}
    if kind == "enum":
        return {"enum": ["é", "two words", 3, None, True, 'a "quote"'][: few + 2]}
    if kind == "const":
        return {"const": {"a": [1, "b\\n"]}}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-c]{2}-[0-9]{1,3}$"}
    if kind == "array":
        return {"type": "array", "items": random_schema(generator, depth + 1), "minItems": 1, "maxItems": few}
    if kind == "anyOf":
        return {"anyOf": [random_schema(generator, depth + 1) for _ in range(few)]}
    if kind == "object":
        names = ["name", "age", "tags", "ø"][:few]
        return {
            "type": "object",
            "properties": {name: random_schema(generator, depth + 1) for name in names},
            "required": names[:-1],
            "additionalProperties": False,
        }
    return {"type": kind}


def test_token_bytes_of_a_text_are_the_text(tokenizer):
    pieces = token_bytes(tokenizer)
    ids = tokenizer.encode("a" + TEXT)
    assert b"".join(pieces[i] for i in ids[1:]).decode().endswith(TEXT[1:])
    assert all(pieces[i] == b"" for i in tokenizer.special_tokens)


def test_random_texts_under_random_schemas_are_valid(tokenizer):
    jsonschema = pytest.importorskip("jsonschema")
    generator = np.random.default_rng(0)
    grammars, pieces = Grammars(tokenizer, tokenizer.vocab_size + 13), token_bytes(tokenizer)
    for number in range(60):
        schema = random_schema(generator)
        text = drawn(grammars, grammars.json_schema(schema), pieces, generator)
        assert text is not None, (number, schema)
        jsonschema.validate(json.loads(text), schema)


def test_regular_expressions_and_objects(tokenizer):
    generator = np.random.default_rng(1)
    grammars, pieces = Grammars(tokenizer), token_bytes(tokenizer)
    for pattern in (r"[a-z]{3}\d{1,4}", r"(yes|no|日本)!{0,3}", r"\([0-9]+,[0-9]{2}\) é"):
        text = drawn(grammars, grammars.regex(pattern), pieces, generator)
        assert text is not None
        assert re.fullmatch(pattern, text)
    written = json.loads(
        drawn(grammars, grammars.json_schema({"type": "array", "items": {"type": "integer"}}), pieces, generator)
        or "[]"
    )
    assert isinstance(written, list)
    first = grammars.json_object().mask()
    allowed = np.flatnonzero(np.unpackbits(first.view(np.uint8), bitorder="little"))
    assert all(pieces[token].startswith(b"{") for token in allowed)


def test_equal_grammars_do_not_share_their_state(sentencepiece):
    grammars = Grammars(sentencepiece)
    one, other = grammars.regex("ab"), grammars.regex("ab")
    before = other.mask()
    one.accept(sentencepiece.encode("xa")[-1])
    np.testing.assert_array_equal(other.mask(), before)
    assert (one.mask() != before).any()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "x"}, "Invalid type"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/nothing"}, "does not exist"),
        ({"$ref": "#"}, "no text"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "refused"),
        (False, "refused"),
        ([], "must be an object"),
        ({"const": "a" * MOST_CHARACTERS}, "at most"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(sentencepiece, schema, message):
    with pytest.raises(InputError, match=message):
        Grammars(sentencepiece).json_schema(schema)


def test_hostile_grammars_are_refused_or_cheap(sentencepiece):
    grammars = Grammars(sentencepiece)
    nested: dict = {}
    for _ in range(5000):
        nested = {"items": nested}
    with pytest.raises(InputError):
        grammars.json_schema(nested)
    for pattern in ("(" * 1000 + "a" + ")" * 1000, "[", "(?P<x>a)\\1", "a" * (MOST_CHARACTERS + 1)):
        with pytest.raises(InputError):
            grammars.regex(pattern)
    for schema in (
        {"type": "string", "pattern": "^(((((a|b)*c){1,1000}){1,1000}){1,100})$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    ):
        constraint = grammars.json_schema(schema)
        for _ in range(20):
            bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
            constraint.accept(int(np.flatnonzero(bits)[-1]))


def test_needs_an_end_token(sentencepiece):
    with pytest.raises(InputError, match="no end token"):
        Grammars(sentencepiece, end_ids=())
