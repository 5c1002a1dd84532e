"""Texts of a random model at temperature 1.5 under 200 JSON schemas: JSON that an independent validator accepts."""

import json
import threading

import numpy as np
import pytest

from infer import Sampling, prepare
from infer.engine import Engine
from infer.grammar import Grammars
from infer.service import Service

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.long

CAPACITY = 1200
WORDS = ["Paris", "naïve", "日本語", 'a "quoted" one', "back\\slash", "line\nend", "", "x", "👩‍👩‍👧", "</script>"]


def finite(random, depth=0):
    """A schema with finitely many texts, all of at most a few hundred bytes."""
    leaves = ["enum", "const", "bounded", "exclusive", "string", "pattern", "boolean", "null", "multiple"]
    nested = ["object", "optional", "array", "tuple", "anyOf", "reference"]
    kind = str(random.choice(leaves + nested * 2 * (depth < 2)))
    few = int(random.integers(1, 4))
    match kind:
        case "enum":
            pool = [*WORDS, None, True, 3, -1.5, [1], {"a": 1}]
            return {"enum": [pool[i] for i in random.permutation(len(pool))[: few + 1]]}
        case "const":
            return {"const": {"name": WORDS[int(random.integers(len(WORDS)))], "list": [few, None]}}
        case "bounded":
            least = int(random.integers(-500, 500))
            return {"type": "integer", "minimum": least, "maximum": least + int(random.integers(0, 2000))}
        case "exclusive":
            return {"type": "integer", "exclusiveMinimum": -few, "exclusiveMaximum": 10 * few}
        case "multiple":
            return {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": few + 1}
        case "string":
            return {"type": "string", "minLength": few - 1, "maxLength": 3 * few}
        case "pattern":
            return {"type": "string", "pattern": "^([A-Z]{2}[0-9]{1,3}|x(yz)?)$"}
        case "boolean" | "null":
            return {"type": kind}
        case "object":
            names = [f"{name}{i}" for i, name in enumerate(["name", "größe", "a b"][:few])]
            properties = {name: finite(random, depth + 1) for name in names}
            return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
        case "optional":
            properties = {"first": finite(random, depth + 1), "second": {"type": "boolean"}, "third": {"type": "null"}}
            return {"type": "object", "properties": properties, "required": ["second"], "additionalProperties": False}
        case "array":
            return {"type": "array", "items": finite(random, depth + 1), "minItems": few - 1, "maxItems": few}
        case "tuple":
            parts = [finite(random, depth + 1), {"type": "boolean"}]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
        case "anyOf":
            return {"anyOf": [finite(random, depth + 1), {"type": "null"}]}
        case _:
            inner = {"type": "object", "properties": {"v": {"$ref": "#/$defs/leaf"}}, "required": ["v"]}
            leaf = {"type": "string", "maxLength": 4}
            # Definitions belong to the root: a nested reference stands for what it refers to.
            return inner | {"additionalProperties": False, "$defs": {"leaf": leaf}} if not depth else leaf


def unbounded(random):
    """A schema with texts of any length."""
    text, number = {"type": "string"}, {"type": "number"}
    schemas = [
        {"type": "object"},
        {"type": "array"},
        {"type": "string"},
        {"type": "number"},
        {"type": "integer", "minimum": 3},
        {"type": "array", "items": text},
        {"type": "array", "items": number, "minItems": 2},
        {"type": "object", "additionalProperties": number},
        {"type": "object", "properties": {"a": text, "b": {"type": "array", "items": number}}, "required": ["a", "b"]},
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}},
        {"type": "array", "items": {"anyOf": [text, number, {"type": "object"}]}},
        {"type": "string", "pattern": "^a+b*$"},
        {"type": "string", "minLength": 5},
    ]
    schema = schemas[int(random.integers(len(schemas)))]
    if "$ref" in schema:
        return schema
    name = f"{WORDS[int(random.integers(3))]}{random.integers(10)}"
    properties = {name: schema, "n": {"type": "null"}}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def different(make, count, random):
    """Schemas of which no two are equal."""
    found = {}
    while len(found) < count:
        schema = make(random)
        found[json.dumps(schema)] = schema
    return list(found.values())


def test_every_text_validates(tokenizer, model_config, random_params):
    """150 finite schemas end by themselves; 50 others end by themselves or at their limit. All that end are valid."""
    random = np.random.default_rng(0)
    schemas = different(finite, 150, random) + different(unbounded, 50, random)
    limits = [CAPACITY - 8] * 150 + [160] * 50
    config = model_config.replace(max_seq_len=CAPACITY)
    params = prepare(config, random_params(config, seed=1))
    grammars = Grammars(tokenizer, config.vocab_size)
    engine = Engine(config, params, slots=8, capacity=CAPACITY, tokenizer=tokenizer)
    texts, ends, all_ended = [""] * len(schemas), [None] * len(schemas), threading.Event()

    def listener(index):
        def hear(request, update):
            texts[index] += update.text
            ends[index] = update.finish_reason
            if None not in ends:
                all_ended.set()

        return hear

    with Service(engine, most_waiting=len(schemas)) as service:
        for index, (schema, limit) in enumerate(zip(schemas, limits, strict=True)):
            sampling = Sampling(temperature=1.5, seed=index)
            service.submit([1, 2, 3], sampling, limit, listener(index), grammars.json_schema(schema))
        assert all_ended.wait(300)

    for schema, text, end in list(zip(schemas, texts, ends, strict=True))[:150]:
        assert end == "stop", (schema, text)
    for schema, text, end in zip(schemas, texts, ends, strict=True):
        assert end in ("stop", "length"), (schema, text)
        if end == "stop":
            jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
        assert not any(space in text for space in ("\n", "\t", "  ")) or '"' in text, "no white space between parts"
    assert ends[150:].count("stop") > 5
