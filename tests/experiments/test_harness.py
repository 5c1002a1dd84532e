"""lm-evaluation-harness drives our models: its tasks run without PyTorch, and its requests are answered by our scores.

`make peers` installs it; without it these tests are skipped.
"""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from infer import score
from model import ModelConfig
from model.convert import load_hf
from model.errors import InputError
from model.tokenizer import load_tokenizer
from train import HParams, TrainConfig, train

pytest.importorskip("lm_eval")
from experiments.evaluate.harness import HarnessModel

TASK = """
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "The people of the", "choices": ["United States", "world", "other nations"], "gold": 0},
    {"question": "I have the honor to", "choices": ["submit", "be"], "gold": 1},
]
COMMAND_LINE = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
absent = ("torch", "transformers")
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in absent else find_spec(name, *rest)
)
from experiments.evaluate.harness import main
main()
assert not set(absent) & set(sys.modules)
"""


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def model(llama_folder):
    return HarnessModel(llama_folder)


def test_a_task_runs_on_a_run_by_its_command_line_without_torch(data, tmp_path):
    config = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=16, max_seq_len=64)
    run = tmp_path / "run"
    train(config, TrainConfig(batch_size=2, seq_len=16), HParams(), data=data, run=run, steps=1)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "own.yaml").write_text(TASK.format(file=questions))
    options = ["--model_args", f"pretrained={run}", "--tasks", "own", "--include_path", str(tmp_path)]
    options += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", COMMAND_LINE, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["own"]["sample_len"] == 2
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    own = HarnessModel(run)
    pairs = [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    for (logprob, greedy), answer in zip(own.loglikelihood(asked(*pairs)), itertools.chain(*found), strict=True):
        assert (pytest.approx(float(answer[0]), abs=1e-4), str(answer[1])) == (logprob, str(greedy))


def test_answers_are_scores_of_the_ids_at_its_boundary(model, llama_folder):
    tokenizer, (config, params) = load_tokenizer(llama_folder), load_hf(llama_folder)
    encode = lambda text: tokenizer.encode(text, special=True)
    begin = [tokenizer.bos_id]
    long = "The people of the United States and of every other nation. " * 20 + "Peace"
    whole = [*begin, *encode(long + " and war")]
    cases = {
        ("The people", " of the nation"): ([*begin, *encode("The people")], encode(" of the nation")),
        ("The people  ", "of"): ([*begin, *encode("The people")], encode("  of")),
        ("", "The people"): (begin, encode("The people")),
        (" ", "The people"): (begin, encode(" The people")),
        ("", "<s>The people"): (begin, encode("The people")),
        ("<s>The", " people"): ([*begin, *encode("The")], encode(" people")),
        (long, " and war"): (whole[-97 : -len(encode(" and war"))], encode(" and war")),
    }
    found = model.loglikelihood(asked(*cases))
    expected = score(config, params, cases.values())
    np.testing.assert_allclose([logprob for logprob, _ in found], expected.logprobs, atol=1e-4)
    assert [greedy for _, greedy in found] == expected.greedy.tolist()
    text = "The people of the United States"
    (rolled,) = model.loglikelihood_rolling(asked((text,)))
    # As in its Hugging Face backend, the begin token that the tokenizer adds is predicted from the prefix token.
    alone = score(config, params, [(begin, [*begin, *encode(text)])]).logprobs[0]
    assert rolled == pytest.approx(alone, abs=1e-4)


def test_what_has_no_tokens_to_score_is_named(model):
    with pytest.raises(InputError, match=r"request 1, \('The', ''\), has a continuation without a token"):
        model.loglikelihood(asked(("The", " people"), ("The", "")))
    with pytest.raises(InputError, match=r"continuation of [0-9]+ tokens, more than max_length=96"):
        model.loglikelihood(asked(("The", " people of the nation" * 30)))


def test_continuations_end_before_stop_strings_and_come_in_order(model):
    prompts = ["The people", "We", "Every nation of the world"]
    plain = model.generate_until(asked(*((prompt, {"max_gen_toks": 12}) for prompt in prompts)))
    stop = next(character for character in plain[2] if character.isascii())
    options = [{"max_gen_toks": 12, "until": stop}, {"max_gen_toks": 3}, {"max_gen_toks": 12, "until": [stop, "\n\n"]}]
    found = model.generate_until(asked(*zip(prompts, options, strict=True)))
    assert found[0] == plain[0].split(stop)[0]
    assert plain[1].startswith(found[1].rstrip("\ufffd"))
    assert found[2] == plain[2].split(stop)[0].split("\n\n")[0]
    drawn = asked(*[("We", {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0})] * 3)
    texts = model.generate_until(drawn)
    assert len(set(texts)) > 1
    assert texts == model.generate_until(drawn)
    with pytest.raises(InputError, match="the generation option num_beams=4 is not supported"):
        model.generate_until(asked(("We", {"num_beams": 4})))
    with pytest.raises(InputError, match="max_gen_toks=96 leaves no room for a prompt in max_length=96"):
        model.generate_until(asked(("We", {"max_gen_toks": 96})))


def test_answers_go_to_its_cache(model):
    kept = []
    model.set_cache_hook(SimpleNamespace(add_partial=lambda *entry: kept.append(entry)))
    requests = {
        "loglikelihood": ("The", " people"),
        "loglikelihood_rolling": ("The people",),
        "generate_until": ("The", {"max_gen_toks": 2}),
    }
    answers = {name: getattr(model, name)(asked(request))[0] for name, request in requests.items()}
    assert kept == [(name, request, answers[name]) for name, request in requests.items()]


def test_conversations_keep_their_special_tokens(model):
    chat = [{"role": "user", "content": "We"}, {"role": "assistant", "content": "the people"}]
    prompt = model.apply_chat_template(chat[:1])
    assert prompt == "<s><|user|>We</s><|user|>"
    assert model.tok_encode(prompt)[:2] == [0, 2]
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "<s><|user|>We</s><|user|>the people"
    assert "bos_token" in model.chat_template(True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 97}, "max_length=97 exceeds the model's max_seq_len=96"),
        ({"batch_size": "many"}, "batch_size='many' is neither a number nor \"auto\""),
        ({"batch_size": 0}, "batch_size=0 must be a whole number"),
    ],
)
def test_options_out_of_range_are_named(llama_folder, options, words):
    with pytest.raises(InputError, match=words):
        HarnessModel(llama_folder, **options)
