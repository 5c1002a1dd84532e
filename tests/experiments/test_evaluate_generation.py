"""Generated answers equal those of one prompt alone, and scorers follow their published definitions."""

import json

import numpy as np
import pytest

from experiments.evaluate.generation import answer_by_generation, generate_answers
from experiments.evaluate.scorers.registry import SCORERS, scorer
from experiments.evaluate.tasks.prompts import build_prompts
from experiments.evaluate.tasks.registry import load_task
from experiments.evaluate.tasks.task import Question, Task
from infer import Sampling, generate
from model import ModelConfig
from model.errors import InputError, UnknownNameError
from model.tokenizer import load_tokenizer


def score(name, output, *answers, **extra):
    return scorer(name).score(output, Question("0", "", answers=answers, extra=extra))


@pytest.mark.parametrize(
    ("name", "output", "answers", "expected"),
    [
        ("exact_match", " Paris\n", ["Paris"], {"exact_match": 1, "f1": 1}),
        ("exact_match", "paris", ["Paris"], {"exact_match": 0, "f1": 1}),
        ("squad", "The cat, on a mat!", ["cat on mat"], {"exact_match": 1, "f1": 1}),
        ("squad", "a black cat", ["the cat", "dog"], {"exact_match": 0, "f1": 2 / 3}),
        ("squad", "", ["cat"], {"exact_match": 0, "f1": 0}),
        ("squad", "cat cat", ["cat"], {"exact_match": 0, "f1": 2 / 3}),  # a word counts as often as in both
        ("triviaqa", "The Beatles-Band", ["beatles band"], {"exact_match": 1, "f1": 1}),
        ("triviaqa_lm_eval", " Jack the Ripper", ["jack the RIPPER!", "x"], {"exact_match": 1}),
        ("triviaqa_lm_eval", "the sun", ["sun"], {"exact_match": 0}),
        ("gsm8k", "3 + 4 = 7 apples\n#### 1,207\n", ["work\n#### 1207"], {"strict_match": 1, "flexible_match": 1}),
        ("gsm8k", "It costs $1,207.", ["1207"], {"strict_match": 0, "flexible_match": 1}),
        ("gsm8k", "no number", ["1207"], {"strict_match": 0, "flexible_match": 0}),
        ("gsm8k", "#### 5 and then 6", ["5"], {"strict_match": 1, "flexible_match": 0}),
        ("gsm8k_sentence", "So the answer is -18. Q: 3", ["-18"], {"strict_match": 1, "flexible_match": 0}),
    ],
)
def test_scorers_follow_their_definitions(name, output, answers, expected):
    assert score(name, output, *answers) == pytest.approx(expected)


def test_an_unknown_scorer_is_named():
    with pytest.raises(UnknownNameError, match="gsm8k"):
        scorer("gsm9k")


def test_no_answer_scores_zero_and_no_scorer_raises_on_odd_text():
    for name in sorted(set(SCORERS) - {"ifeval"}):
        for output in ("", "\n", "####", "$.,", "é 𝟙"):
            assert set(score(name, output, "42").values()) <= {0.0}


def test_instructions_are_checked_strictly_and_loosely():
    pytest.importorskip("if_verifiable")
    row = {"prompt": "", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    found = score("ifeval", "Sure, here:\nno commas", **row)
    assert found == {"prompt_strict": 0, "prompt_loose": 1, "partial_strict": 0, "partial_loose": 1}


def test_a_batch_answers_like_each_prompt_alone(data, random_params):
    tokenizer = load_tokenizer(data)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=64
    )
    params = random_params(config)
    prompts = [np.arange(3, 3 + length).tolist() for length in (2, 9, 5, 2, 7)]
    options = {"stop": ("e",), "max_new_tokens": 12}
    outputs = generate_answers(config, params, tokenizer, prompts, batch_size=3, **options)
    sampling = Sampling(temperature=0.0, stop_strings=("e",), stop_ids=tokenizer.eos_ids)
    alone = [generate(config, params, [p], sampling, max_new_tokens=12, tokenizer=tokenizer) for p in prompts]
    assert [(one.text, one.finish_reason) for one in outputs] == [(one.text[0], one.finish_reason[0]) for one in alone]
    assert all("e" not in one.text for one in outputs)
    question = Question("q1", "the " * 70, answers=("x",))
    task = Task("own", "own", "generation", (question,), "f1", max_new_tokens=8)
    with pytest.raises(InputError, match=r"task own, question 'q1': its \d+ tokens and 8 new ones .*context of 64; "):
        answer_by_generation(config, params, tokenizer, task, build_prompts(task))
    cut = answer_by_generation(config, params, tokenizer, task.replace(truncate=True), build_prompts(task))
    (row,) = cut.rows
    assert cut.truncated == 1
    assert row["answers"] == ["x"]
    assert set(row["metrics"]) == {"exact_match", "f1"}


def test_wrong_scorers_of_own_tasks_are_explained(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "1 + 1 =", "answers": ["2"]}))
    toml = tmp_path / "sums.toml"
    toml.write_text('questions = "rows.jsonl"\nmetric = "f2"\nscorer = "squad"')
    with pytest.raises(InputError, match="task sums: metric='f2' should be one that scorer='squad' gives: exact_match"):
        load_task(str(toml))
    toml.write_text('questions = "rows.jsonl"\nmetric = "f1"\nscorer = "squad"')
    assert load_task(str(toml)).metric == "f1"
