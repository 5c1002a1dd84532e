"""Answers to tasks: log-probabilities of whole passes, metrics by hand, intervals, files that are kept and reused."""

import json
import math
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.evaluate.answers import keep_result, read_answers, read_results, write_answers
from experiments.evaluate.choice import answer_choices, choice_metrics, encode_prompts
from experiments.evaluate.run import EvaluatedModel, Settings, evaluate_tasks, model_hash
from experiments.evaluate.summary import summarise
from experiments.evaluate.tasks.prompts import build_prompts
from experiments.evaluate.tasks.registry import load_task
from experiments.evaluate.tasks.task import Question, Task
from experiments.evaluate.text_domains import by_domain, rolling_windows
from model import InputError, ModelConfig, apply
from model.convert import save_hf
from model.tokenizer import load_tokenizer

MADE = runpy.run_path(str(Path(__file__).with_name("task_package.py")))
CONFIG = ModelConfig(
    vocab_size=320, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=96, eos_token_ids=(2,)
)
WORDS = MADE["WORDS"]


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(data)


@pytest.fixture(scope="module")
def params(random_params):
    return jax.tree.map(lambda leaf: 3 * leaf, random_params(CONFIG))


@pytest.fixture(scope="module")
def model(params, tokenizer):
    return EvaluatedModel.of("tiny", CONFIG, params, tokenizer)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return MADE["make_package"](tmp_path_factory.mktemp("package"))


def task(size=9, **changes):
    questions = tuple(
        Question(
            f"q{number}",
            f"The {WORDS[number]} of {WORDS[number + 3]}:",
            tuple(WORDS[number + 1 : number + 4]),
            (number % 3,),
            cluster=f"c{number // 2}",
        )
        for number in range(size)
    )
    return Task("made", "own", "choice", questions, "acc_norm", unconditional="The:").replace(**changes)


def test_answers_are_those_of_whole_passes_in_any_order(params, tokenizer):
    asked = task()
    prompts = build_prompts(asked)
    found = answer_choices(CONFIG, params, tokenizer, asked, prompts)
    requests, _ = encode_prompts(CONFIG, tokenizer, asked, prompts)
    flat = [request for one in requests for request in (*one.conditional, *one.unconditional)]
    ids = np.zeros((len(flat), 48), np.int32)
    for place, request in enumerate(flat):
        whole = [*request.context, *request.continuation]
        ids[place, : len(whole)] = whole
    logprobs = np.asarray(jax.nn.log_softmax(jax.jit(apply, static_argnums=0)(CONFIG, params, ids)))
    wanted = []
    for row, request in zip(logprobs, flat, strict=True):
        first = len(request.context) - 1
        wanted.append(sum(row[first + place, token] for place, token in enumerate(request.continuation)))
    given = [value for row in found.rows for value in (*row["logprobs"], *row["unconditional"])]
    np.testing.assert_allclose(given, wanted, rtol=1e-4)
    assert [row["characters"] for row in found.rows] == [[len(text) for text in q.choices] for q in asked.questions]
    back = answer_choices(CONFIG, params, tokenizer, asked, prompts[::-1])
    assert back.rows[::-1] == found.rows


ROW = {
    "gold": [1],
    "logprobs": [-4.0, -6.0, -4.0],
    "characters": [4, 8, 6],
    "bytes": [4, 12, 8],
    "tokens": [2, 2, 1],
    "unconditional": [-1.0, -5.0, -3.0],
    "greedy": [True, False, False],
}


def test_metrics_are_those_of_their_definitions_and_the_first_of_equals_wins():
    found = choice_metrics(ROW)
    picked = {"acc": 0, "acc_norm": 2, "acc_bytes": 1, "acc_tokens": 0, "acc_pmi": 1}
    assert {name: found[name] for name in picked} == {name: int(choice == 1) for name, choice in picked.items()}
    assert choice_metrics(ROW | {"gold": [0]})["acc"] == 1, "choices 0 and 2 are equally likely"
    assert choice_metrics(ROW | {"gold": [2]})["acc"] == 0
    assert found["prob"] == pytest.approx(math.exp(-6) / (2 * math.exp(-4) + math.exp(-6)))
    assert found["bits_per_byte"] == pytest.approx(6 / math.log(2) / 12)
    assert (found["greedy"], choice_metrics(ROW | {"gold": [1, 0]})["greedy"]) == (0, 1)
    single = {"gold": [0], "logprobs": [-1.0], "bytes": [3], "greedy": [True], "unconditional": None}
    assert set(choice_metrics(single)) == {"bits_per_byte", "greedy"}


def test_a_context_that_is_too_long_is_refused_or_cut_as_lm_eval_does(tokenizer):
    short = CONFIG.replace(max_seq_len=24)
    asked = task(shots=3)
    with pytest.raises(
        InputError, match=r"task made, question 'q0' has \d+ tokens, more than the model's context of 24; ask for fewer"
    ):
        encode_prompts(short, tokenizer, asked, build_prompts(asked))
    asked = asked.replace(truncate=True, unconditional=None)
    prompts = build_prompts(asked)
    cut, number = encode_prompts(short, tokenizer, asked, prompts)
    whole, _ = encode_prompts(CONFIG.replace(max_seq_len=999), tokenizer, asked, prompts)
    assert number == len(prompts)
    for some, every in zip(cut, whole, strict=True):
        for left, right in zip(some.conditional, every.conditional, strict=True):
            kept = [*right.context, *right.continuation][-(24 + 1) :]
            assert ([*left.context, *left.continuation], left.continuation) == (kept, right.continuation)


def test_windows_predict_each_token_once_after_the_longest_context():
    assert rolling_windows([5, 6, 7, 8, 9], 1, 3) == [([1], [5, 6, 7]), ([6, 7], [8, 9])]
    assert rolling_windows([], 1, 3) == []
    for length in range(1, 14):
        ids = list(range(10, 10 + length))
        windows = rolling_windows(ids, 1, 4)
        assert [token for _, predicted in windows for token in predicted] == ids
        assert all(len(context) + len(predicted) - 1 <= 4 for context, predicted in windows)
        if length >= 4:
            assert all(len(context) + len(predicted) - 1 == 4 for context, predicted in windows)


def test_texts_are_measured_by_domain(model, tmp_path):
    rows = [{"text": " ".join(WORDS * 4), "domain": "a"}, *({"text": text, "domain": "b"} for text in ("peace", "The"))]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for domain, name, text in (("a", "1.txt", rows[0]["text"]), ("b", "1.txt", "peace"), ("b", "2.md", "The")):
        (tmp_path / "folder" / domain).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / domain / name).write_text(text)
    (result, of_folder) = evaluate_tasks(
        [model], [load_task(str(tmp_path / name)) for name in ("texts.jsonl", "folder")]
    )
    assert result["domains"] == of_folder["domains"]
    found = result["domains"]
    assert (found["a"]["texts"], found["b"]["texts"], found["b"]["bytes"]) == (1, 2, 8)
    assert found["a"]["tokens"] > 96, "it takes more than one window"
    total = sum(one["bits_per_byte"] * one["bytes"] for one in found.values()) / sum(
        one["bytes"] for one in found.values()
    )
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(total)
    nats = math.log(found["b"]["perplexity"]) * found["b"]["tokens"]
    assert found["b"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / 8)
    assert by_domain([{"cluster": "x", "nats": math.log(2), "tokens": 1, "bytes": 4}])["x"]["bits_per_byte"] == 0.25


def test_standard_errors_know_clusters_and_intervals_cover():
    random_ = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        rates = np.clip(0.8 + 0.15 * random_.standard_normal(60), 0, 1)
        rows = [
            {"cluster": str(place), "metrics": {"acc": int(random_.random() < rate)}}
            for place, rate in enumerate(rates)
            for _ in range(3)
        ]
        found = summarise("choice", rows)["acc"]
        covered += found["low"] <= np.clip(0.8 + 0.15 * random_.standard_normal(9999), 0, 1).mean() <= found["high"]
    assert 0.91 <= covered / 300 <= 0.985
    perfect = summarise("choice", [{"cluster": "", "metrics": {"acc": 1}}] * 8)["acc"]
    assert (perfect["standard_error"], perfect["high"], perfect["low"] < 0.7) == (0, 1, True)


def test_finished_answers_are_reused_and_damaged_ones_computed_again(model, package, tmp_path, monkeypatch):
    tasks = [load_task(name, "lm-eval", package) for name in ("hellaswag", "winogrande")]
    started = []

    def evaluate(**settings):
        started.clear()
        return evaluate_tasks(
            [model],
            tasks,
            Settings(limit=3, **settings),
            out=tmp_path,
            started=lambda model, task: started.append(task.name),
        )

    first = evaluate()
    assert started == ["hellaswag", "winogrande"]
    assert all(result["compiles"] <= 4 for result in first)
    assert evaluate() == first
    assert not started
    assert json.loads((tmp_path / "results.json").read_text())["results"] == first
    file = tmp_path / first[0]["answers"]
    assert file.parent.name == f"tiny-{model.hash[:8]}"
    answers = read_answers(file)
    assert answers.header["settings"]["limit"] == 3
    assert [row["id"] for row in answers.rows] == ["0", "1", "2"]
    text = file.read_text()
    for damaged, words in (
        (text[: len(text) // 2], "is damaged .*; delete the file and evaluate again"),
        ("".join(text.splitlines(keepends=True)[:-1]), "has 2 of 3 answers; it was cut off"),
        ("{}\n", "is not an answers file"),
    ):
        file.write_text(damaged)
        with pytest.raises(InputError, match=words):
            read_answers(file)
        assert evaluate()[0]["metrics"] == first[0]["metrics"]
        assert started == ["hellaswag"]
    evaluate(shots=1)
    assert started == ["hellaswag", "winogrande"], "other settings are other answers"
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 4
    with pytest.raises(InputError, match="2 tasks are named hellaswag under protocol lm-eval; give them different"):
        evaluate_tasks([model], [tasks[0]] * 2)


def test_processes_that_share_a_folder_keep_each_others_results(tmp_path):
    found = [{"model": "m", "model_hash": "h", "task": "t", "answers": f"{number}.jsonl"} for number in range(24)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda result: keep_result(tmp_path, result), found))
    assert sorted(read_results(tmp_path), key=found.index) == found
    keep_result(tmp_path, found[3] | {"seconds": 1.0})
    assert len(read_results(tmp_path)) == 24


def test_results_of_another_program_stay_as_they_are(model, tmp_path):
    for text in ('{"accuracy": 0.5}', "[1]", '{"results": [{"accuracy": 0.5}]}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(
            InputError, match=r"not the results\.json that `isoflop eval` writes; choose another folder"
        ):
            evaluate_tasks([model], [task(2)], out=tmp_path)
        assert (tmp_path / "results.json").read_text() == text


def test_a_diverged_model_has_no_scores(params, tokenizer):
    broken = EvaluatedModel.of("broken", CONFIG, jax.tree.map(lambda leaf: leaf * np.nan, params), tokenizer)
    with pytest.raises(InputError, match="question 'q0': the model gives a log-probability that is not finite"):
        evaluate_tasks([broken], [task()])


def test_another_chat_template_is_another_model(params, tokenizer):
    templates = ("{{ messages[0].content }}", "{{ messages[0].content }}!")
    hashes = {model_hash(CONFIG, params, tokenizer.with_chat_template(text)) for text in templates}
    assert len(hashes) == 2


def test_a_wrong_line_of_an_answers_file_is_named(tmp_path):
    header = dict.fromkeys(("model", "model_hash", "task", "protocol", "metric", "task_hash", "settings"), "x")
    file = tmp_path / "answers.jsonl"
    write_answers(file, header | {"questions": 1}, [{"id": "\u2028", "cluster": ""}])
    with pytest.raises(InputError, match="line 2 lacks 'metrics'"):
        read_answers(file)
    write_answers(file, header | {"questions": 1}, [{"id": "\u2028", "cluster": "", "metrics": {}}])
    assert read_answers(file).rows[0]["id"] == "\u2028"
    write_answers(file, header | {"questions": 1, "schema_version": 7}, [])
    with pytest.raises(InputError, match="has schema_version 7, this isoflop reads 1"):
        read_answers(file)


def test_the_command_prints_a_table_and_writes_the_numbers(params, data, package, tmp_path, isoflop):
    folder = tmp_path / "hf"
    save_hf(CONFIG, params, folder)
    words = ["eval", folder, "--tokenizer", data, "--tasks", "arc_easy", "mmlu", "--task-data", package]
    words += ["--out", tmp_path / "out"]
    code, out, err = isoflop(*words, "--json", tmp_path / "numbers.json")
    assert code == 0, err
    assert "hf: arc_easy (isoflop), 5 questions" in err
    assert "cannot be distinguished from chance, 30.0 %" in out
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert [result["task"] for result in document["results"]] == ["arc_easy", "mmlu"]
    assert {"acc", "acc_norm", "acc_bytes", "acc_tokens", "prob", "bits_per_byte"} <= set(
        document["results"][0]["metrics"]
    )
    again, out, err = isoflop(*words)
    assert (again, "questions" in out, "questions" in err) == (0, True, False)
    for more, said in (
        (["--data", data], "give --data FOLDER for the loss on its validation split, or --tasks NAME"),
        (["--shots", "7"], "the pool has 4 other questions, fewer than 7 shots; ask for at most 4"),
        (["--protocol", "helm"], "unknown protocol of arc_easy 'helm'"),
        (["--limit", "0"], "limit=0 must be a whole number of at least 1"),
    ):
        code, _, err = isoflop(*words, *more)
        assert (code, said in err) == (2, True), err
    code, _, err = isoflop("eval", folder, "--tokenizer", data)
    assert (code, "give --data FOLDER" in err) == (2, True)
