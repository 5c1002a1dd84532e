"""`isoflop compare`: models by their answers, refusals of what cannot be paired, the page and the document."""

import json

import numpy as np
import pytest
from answer_folders import write_folder

from experiments.evaluate.compare import compare
from experiments.evaluate.evaluations import read_evaluations
from experiments.evaluate.sentences import sentences
from experiments.evaluate.statistics.paired import holm, mcnemar

TASKS = {"easy": {"questions": 500}, "hard": {"questions": 400, "choices": 2}}
ABILITIES = {"first": 0.6, "same": 0.62, "weak": {"easy": -0.6, "hard": 0.1, "prose": -2.0}}
DOMAINS = ("code", "news")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("compared") / "evals", ABILITIES, TASKS, domains=DOMAINS)


def rows_of(folder, model, task):
    (file,) = folder.glob(f"{model}-*/{task}*.jsonl")
    return file, [json.loads(line) for line in file.read_text().splitlines()]


def rewritten(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_worse_model_is_told_apart_and_an_equal_one_is_not(folder):
    found = compare(read_evaluations(folder))
    assert (found.models, found.baseline) == (("first", "same", "weak"), "first")
    easy = next(task for task in found.tasks if task.task == "easy")
    assert [(row.second, row.verdict) for row in easy.differences] == [
        ("same", "cannot be distinguished"), ("weak", "worse")
    ]  # fmt: skip
    equal, weak = sentences(found)
    assert equal == "same cannot be distinguished from first on any of the 3 tasks."
    assert weak.startswith("weak is worse than first on easy")
    assert [row.adjusted_p for row in found.differences] == holm([row.paired.p for row in found.differences])
    scores = [line["metrics"]["acc"] for line in rows_of(folder, "weak", "easy")[1][1:]]
    assert easy.scores[2].mean.value == pytest.approx(np.mean(scores))
    paired = easy.differences[0].paired
    assert paired.p == pytest.approx(float(mcnemar(np.array(paired.only_first), np.array(paired.only_second))))
    assert abs(easy.differences[1].paired.mean) > easy.differences[1].detectable > 0.02


def test_the_best_of_each_task_is_compared_with_all_others(folder):
    found = compare(read_evaluations(folder), baseline="best")
    for task in found.tasks:
        assert len(task.differences) == 3
        values = {score.name: score.mean.value for score in task.scores}
        assert task.best == (max if task.higher_is_better else min)(values, key=values.get)
        assert found.reference(task) == task.best
        assert set(task.indistinguishable) <= {"first", "same", "weak"} - {task.best}
    easy = next(task for task in found.tasks if task.task == "easy")
    assert "weak" not in easy.indistinguishable
    assert f"easy: {easy.best} has the best acc" in sentences(found)[0]


def test_bits_per_byte_are_bits_over_bytes_by_domain(folder):
    found = next(task for task in compare(read_evaluations(folder)).tasks if task.task == "prose")
    _, (_, *lines) = rows_of(folder, "weak", "prose")
    bits, size = (sum(line[name] for line in lines) for name in ("nats", "bytes"))
    assert found.scores[2].mean.value == pytest.approx(bits / size / np.log(2))
    assert [domain.name for domain in found.domains] == ["code", "news"]
    code = [line for line in lines if line["cluster"] == "code"]
    bits, size = (sum(line[name] for line in code) for name in ("nats", "bytes"))
    assert found.domains[0].scores[2].mean.value == pytest.approx(bits / size / np.log(2))
    assert (found.higher_is_better, found.best != "weak") == (False, True)
    assert found.differences[1].verdict == "worse"
    assert found.differences[1].paired.mean > 0
    # Documents differ far more than two models differ on one document.
    assert found.differences[1].paired.standard_error < 0.2 * found.scores[0].mean.standard_error
    assert all(domain.differences[1].adjusted_p >= domain.differences[1].paired.p for domain in found.domains)


def test_questions_of_a_subject_are_a_cluster(tmp_path):
    tasks = {"subjects": {"questions": 300, "clusters": 20}}
    found = compare(read_evaluations(write_folder(tmp_path, {"a": 0.5, "b": 0.5}, tasks)))
    (task,) = found.tasks
    assert (task.clusters, task.differences[0].paired.test) == (20, "clustered t")
    assert task.differences[0].paired.freedom == pytest.approx(19)


def test_settings_of_ready_requests_are_not_mixed(tmp_path):
    tasks = {"easy.olmes": {"questions": 30, "protocol": "olmes:rc"}}
    folder = write_folder(tmp_path, {"a": 0.5, "b": 0.7}, tasks, results=False)
    for file in list(folder.glob("*/*.jsonl")):
        header, *rows = [json.loads(line) for line in file.read_text().splitlines()]
        rewritten(file.with_name("easy.olmes.olmes-rc.first-10.jsonl"), [header | {"questions": 10}, *rows[:10]])
        file.rename(file.with_name("easy.olmes.olmes-rc.jsonl"))
    found = compare(read_evaluations(folder))
    assert {task.protocol: task.questions for task in found.tasks} == {"olmes:rc": 30, "olmes:rc.first-10": 10}


def test_another_metric_and_tasks_that_lack_it(folder):
    found = compare(read_evaluations(folder), metric="acc_norm")
    assert {task.task for task in found.tasks} == {"easy", "hard"}
    assert found.left_out == ("prose (isoflop) has no acc_norm of first, same, weak.",)
    assert all(task.metric == "acc_norm" for task in found.tasks)
    bits = compare(read_evaluations(folder), metric="bits_per_byte")
    easy = next(task for task in bits.tasks if task.task == "easy")
    assert (easy.higher_is_better, easy.differences[0].paired.test, easy.is_text) == (False, "t", False)


def test_protocols_are_compared_on_the_questions_they_share(tmp_path, isoflop, no_svg, words):
    shape = {"questions": 200, "named": "easy"}
    two = {"easy": shape | {"protocol": "olmes"}, "easy again": shape | {"protocol": "lm-eval"}}
    write_folder(tmp_path, {"a": {"easy": 0.5, "easy again": 0.5}}, two)
    file, lines = rows_of(tmp_path, "a", "easy.lm-eval")
    for line in lines[1:]:
        line["id"] = line["id"].replace("easy again", "easy")
    lines[0]["questions"] = 150
    rewritten(file, [lines[0], *lines[150:0:-1]])  # fewer, and in another order
    found = compare(read_evaluations(tmp_path), protocols=True)
    (task,) = found.tasks
    assert (task.questions, task.model, found.baseline) == (150, "a", None)
    assert [score.name for score in task.scores] == ["lm-eval", "olmes"]
    by_id = {line["id"]: line["metrics"]["acc"] for line in lines[1:151]}
    olmes = {line["id"]: line["metrics"]["acc"] for line in rows_of(tmp_path, "a", "easy.olmes")[1][1:]}
    mean = np.mean([olmes[name] - value for name, value in by_id.items()])
    assert task.differences[0].paired.mean == pytest.approx(mean)
    (sentence,) = sentences(found)
    assert sentence.startswith("a on easy: olmes")
    assert isoflop("compare", tmp_path, "--protocols", "--report", tmp_path / "page.html")[0] == 0
    seen = words((tmp_path / "page.html").read_text())
    assert "Protocols of a" in seen
    assert sentence in seen
    assert not {"better", "worse"} & set(seen.split("What these questions can show")[0].split())


def test_two_models_of_one_name_are_named_with_their_hashes(tmp_path):
    write_folder(tmp_path, {"a": 0.5, "b": 0.5}, {"easy": {"questions": 50}}, results=False)
    file, lines = rows_of(tmp_path, "b", "easy")
    digest = lines[0]["model_hash"]
    lines[0]["model"] = "a"
    rewritten(file, lines)
    models = compare(read_evaluations(tmp_path)).models
    assert models[1] == f"a-{digest[:8]}" != models[0]


def test_answers_under_other_settings_are_compared_apart(tmp_path):
    """`--limit 20` leaves a second file of the same task and protocol beside that of all questions."""
    write_folder(tmp_path, {"a": 0.5, "b": 0.5}, {"easy": {"questions": 50}})
    for model in ("a", "b"):
        file, lines = rows_of(tmp_path, model, "easy")
        lines[0]["questions"] = 20
        rewritten(file.with_name("easy.isoflop.first-20.jsonl"), lines[:21])
    found = compare(read_evaluations(tmp_path))
    assert [task.questions for task in found.tasks] == [20, 50]
    assert sentences(found)[0].endswith("on easy (isoflop.first-20) and easy (isoflop).")


REFUSALS = {
    "another prompt": (
        lambda lines: lines[3].update(prompt_sha256="other"),
        r"^easy \(isoflop\): 1 prompt of b is not as of a, the first one of easy/2; evaluate both under one protocol",
    ),
    "another question": (lambda lines: lines[3].update(id="other"), "50 questions of a and 50 of b are not the same"),
    "cut short": (lambda lines: lines.pop(), "49"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_answers_that_are_no_pairs_are_refused(tmp_path, case):
    change, said = REFUSALS[case]
    write_folder(tmp_path, {"a": 0.5, "b": 0.5}, {"easy": {"questions": 50}})
    file, lines = rows_of(tmp_path, "b", "easy")
    change(lines)
    rewritten(file, lines)
    with pytest.raises(ValueError, match=said):
        compare(read_evaluations(tmp_path))


def test_wrong_calls_are_explained_in_one_sentence(folder, tmp_path, isoflop):
    for call, said in {
        (tmp_path,): "has no answers; make them with isoflop eval",
        (folder, "--baseline", "third"): "unknown model 'third'; supported are 'first', 'same', 'weak', 'best'",
        (folder, "--metric", "f1"): "unknown metric 'f1'; supported are 'acc'",
        (folder, "--protocols"): "has no task that a model answered under two protocols",
    }.items():
        code, _, error = isoflop("compare", *call)
        assert (code, error.count("\n")) == (2, 1)
        assert said in error
    write_folder(tmp_path / "one", {"a": 0.5}, {"easy": {"questions": 50}})
    code, _, error = isoflop("compare", tmp_path / "one")
    assert code == 2
    assert "has answers of a alone" in error


def test_a_model_that_lacks_a_task_is_named(tmp_path):
    write_folder(tmp_path, {"a": 0.5, "b": 0.5}, {"easy": {"questions": 50}})
    write_folder(tmp_path, {"a": 0.5}, {"other": {"questions": 50}}, results=False)
    found = compare(read_evaluations(tmp_path))
    assert found.left_out == ("b did not answer other (isoflop).",)
    assert len(found.differences) == 1


def test_the_command_writes_the_table_the_document_and_the_page(folder, tmp_path, isoflop, words):
    page, document = tmp_path / "page.html", tmp_path / "found.json"
    code, out, _ = isoflop("compare", folder, "--report", page, "--json", document)
    assert code == 0
    assert "same cannot be distinguished from first" in out
    assert "corrected for 6 comparisons" in out
    read = json.loads(document.read_text())
    assert (read["comparisons"], read["baseline"], len(read["sentences"])) == (6, "first", 2)
    easy = read["tasks"][0]
    assert {"p", "adjusted_p", "low", "high", "verdict", "detectable", "only_second"} <= set(easy["differences"][0])
    assert 0 < easy["scores"][0]["calibration"]["ece"] < 1
    text = page.read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    seen = words(text)
    assert "same cannot be distinguished from first on any of the 3 tasks." in seen
    assert "easy acc in %, 500 questions, protocol isoflop, 0 shots, chance 25.0" in seen
    assert "What these questions can show" in seen
    assert "ms a question" in seen
    assert "latency" not in seen


@pytest.mark.parametrize("options", [{"baseline": "best"}, {"metric": "bits_per_byte"}, {"metric": "acc_norm"}])
def test_pages_of_other_comparisons(folder, tmp_path, options, phone_figures, words):
    """Every kind of page is made, and the text of its figures can be read on a phone."""
    from experiments.evaluate.report import write_comparison_page

    evaluations = read_evaluations(folder)
    write_comparison_page(tmp_path / "page.html", evaluations, compare(evaluations, **options))
    seen = words((tmp_path / "page.html").read_text())
    assert ("the best of each task" in seen) == ("baseline" in options)
    found = compare(evaluations, **options)
    assert seen.count("reference") == len(found.tasks)
    table = seen.split("corrected p")[1].split("Differences of shares")[0]
    assert table.count("p = ") + table.count("p < ") == 2 * 2 * len(found.tasks)  # once for a phone, once for a desktop
    assert len(phone_figures) >= (2 if options.get("metric") != "bits_per_byte" else 1)


def test_optional_costs_are_shown_where_they_are_known(folder, tmp_path, no_svg, words):
    from dataclasses import replace

    from experiments.evaluate.report import write_comparison_page

    evaluations = read_evaluations(folder)
    timed = [row | {"tokens": 1000, "latency_seconds": 0.25} for row in evaluations.results]
    found = compare(evaluations)
    write_comparison_page(tmp_path / "page.html", replace(evaluations, results=tuple(timed)), found)
    seen = words((tmp_path / "page.html").read_text())
    assert "µs a token" in seen
    assert "0.250" in seen
    write_comparison_page(tmp_path / "page.html", replace(evaluations, results=()), found)
    assert "no results.json with times" in words((tmp_path / "page.html").read_text())
