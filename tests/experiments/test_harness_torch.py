"""Our answers to lm-evaluation-harness are those of its own Hugging Face backend, on the same weights.

`make peers` installs it with PyTorch and Transformers; without them these tests are skipped.
"""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
pytest.importorskip("transformers")
from lm_eval.models.huggingface import HFLM

from experiments.evaluate.harness import HarnessModel

pytestmark = pytest.mark.long
CONTEXTS = (
    "",
    "The people of the",
    "Two spaces  ",
    "A line\n",
    "goo",
    "日本語の",
    "naïve café 👩‍👩‍👧",
    "<|user|>We</s>",
    "<s>The",
)
CONTINUATIONS = (" nation", "d morning", "  two", "文章", " e\u0301 👍🏽", "\n\nof 1234 states", "</s>")


@pytest.fixture(scope="module")
def own(llama_folder):
    return HarnessModel(llama_folder)


@pytest.fixture(scope="module")
def theirs(llama_folder):
    return HFLM(pretrained=str(llama_folder), device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def requests(corpus):
    """500 requests: questions of real text, shots before them, edge cases, rows past the context of 96 tokens."""
    words = sorted(corpus.iterdir())[0].read_text(encoding="utf-8").split()
    random = np.random.default_rng(0)

    def some(most):
        start = random.integers(0, len(words) - most)
        return " ".join(words[start : start + random.integers(1, most)])

    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    pairs += [(" ".join(words[:count]), f" {some(8)}") for count in range(60, 120, 4)]
    while len(pairs) < 500:
        context = some(30)
        pairs += [(context, f" {some(6)}") for _ in range(3)]
    return [SimpleNamespace(args=pair, task_name=None) for pair in pairs[:500]]


def test_log_likelihoods_are_theirs_in_any_order_and_batch(own, theirs, requests, llama_folder):
    found = own.loglikelihood(requests)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=0, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    order = np.random.default_rng(1).permutation(len(requests))
    other = HarnessModel(llama_folder, batch_size=3).loglikelihood([requests[number] for number in order])
    difference = np.array([one for one, _ in other]) - np.array([found[number][0] for number in order])
    assert abs(difference).max() < 1e-4


def test_texts_of_any_length_and_continuations_are_theirs(own, theirs, requests):
    texts = [
        "one",
        "日本語の文章",
        *(context + continuation for context, continuation in (r.args for r in requests[60:70])),
    ]
    rolling = [SimpleNamespace(args=(text,), task_name=None) for text in texts]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    np.testing.assert_allclose(own.loglikelihood_rolling(rolling), expected, rtol=1e-5)
    options = {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": False}
    prompts = [SimpleNamespace(args=(context, options), task_name=None) for context in CONTEXTS[1:5]]
    assert own.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


def test_chat_templates_are_theirs(own, theirs):
    chat = [{"role": "user", "content": "We"}, {"role": "assistant", "content": "the people"}]
    assert own.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    whole = (own.apply_chat_template(chat, False), theirs.apply_chat_template(chat, False))
    assert whole[0] == whole[1]
    assert own.chat_template(True) == theirs.chat_template(True)
    assert (own.prefix_token_id, own.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
