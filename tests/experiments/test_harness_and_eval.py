"""`isoflop eval` under the protocol of lm-evaluation-harness gives what lm-evaluation-harness gives on our model.

`make peers` installs it; without it these tests are skipped.
"""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from experiments.evaluate.answers import read_answers
from experiments.evaluate.harness import HarnessModel
from experiments.evaluate.run import EvaluatedModel, evaluate_tasks
from experiments.evaluate.tasks.task import Question, Task
from model.store import open_model

CHOICES = (" nation", "peace  and war", "日本語", "states of the world")
QUERIES = ("The people of the", "Two spaces  ", "A line\n", "naïve café", "")


@pytest.mark.long
def test_choices_have_its_log_probabilities(llama_folder, tmp_path):
    questions = [
        Question(id=str(number), query=query, choices=CHOICES, gold=(0,)) for number, query in enumerate(QUERIES)
    ]
    task = Task("own", "lm-eval", "choice", tuple(questions), "acc", boundary="lm-eval")
    opened = open_model(llama_folder)
    (result,) = evaluate_tasks([EvaluatedModel.of("llama", *opened)], [task], out=tmp_path)
    rows = read_answers(tmp_path / result["answers"]).rows
    pairs = [(query, f" {choice}") for query in QUERIES for choice in CHOICES]
    found = HarnessModel(llama_folder).loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    logprobs = np.array([logprob for logprob, _ in found]).reshape(len(QUERIES), -1)
    np.testing.assert_allclose([row["logprobs"] for row in rows], logprobs, rtol=0, atol=1e-4)
    assert [answer for row in rows for answer in row["greedy"]] == [greedy for _, greedy in found]
    assert [row["metrics"]["acc"] for row in rows] == (logprobs.argmax(1) == 0).astype(int).tolist()
