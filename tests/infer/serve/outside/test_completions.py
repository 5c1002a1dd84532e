"""Completions as clients call them, the older API that evaluations use."""

import pytest

PROMPT = "The capital of France is"


def choices_of(answer):
    assert answer.status == 200, answer.text
    return answer.body["choices"]


def text_of(answer):
    return choices_of(answer)[0]["text"]


@pytest.fixture(scope="session")
def ids(server):
    """The ids of PROMPT."""
    answer = server.post("/tokenize", prompt=PROMPT, content=PROMPT, add_special=False, add_special_tokens=False)
    return answer.body["tokens"]


def test_a_completion_has_openais_form(server, client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
    assert answer.object == "text_completion"
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_the_default_limit_is_openais(ours):
    answer = ours.post("/v1/completions", prompt=PROMPT, ignore_eos=True)
    assert answer.body["usage"]["completion_tokens"] == 16


def test_a_prompt_of_ids_is_its_text(server, ids):
    assert text_of(server.complete(ids)) == text_of(server.complete(PROMPT))


def test_prompts_together_are_prompts_alone(server, ids):
    other = "One, two, three,"
    (first, second) = choices_of(server.complete([PROMPT, other], max_tokens=5))
    assert [first["index"], second["index"]] == [0, 1]
    assert first["text"] == text_of(server.complete(PROMPT, max_tokens=5))
    assert second["text"] == text_of(server.complete(other, max_tokens=5))


def test_lists_of_ids_together(server, ids):
    (first, second) = choices_of(server.complete([ids, ids]))
    assert first["text"] == second["text"] == text_of(server.complete(ids))


def test_texts_and_ids_together(server, ids):
    (first, second) = choices_of(server.complete([ids, PROMPT]))
    assert first["text"] == second["text"]


def test_a_list_of_one_text(server):
    assert text_of(server.complete([PROMPT])) == text_of(server.complete(PROMPT))


def test_several_choices_of_several_prompts(ours):
    choices = choices_of(ours.complete([PROMPT, "One, two,"], n=2, temperature=1, seed=3))
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


def test_usage_counts_every_prompt(server, ids):
    one = server.complete(ids).body["usage"]["prompt_tokens"]
    assert one == len(ids)
    assert server.complete([ids, ids]).body["usage"]["prompt_tokens"] == 2 * one


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_in_the_older_form(ours, count):
    (choice,) = choices_of(ours.complete(max_tokens=4, logprobs=count))
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["token_logprobs"]) == len(found["text_offset"]) == 4
    assert all(value <= 0 for value in found["token_logprobs"])
    if count:
        for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
            assert count <= len(top) <= count + 1
            assert max(top.values()) == value, "greedy: the very same number"


def test_echo_begins_with_the_prompt(ours):
    assert text_of(ours.complete(echo=True)) == PROMPT + text_of(ours.complete())


def test_echo_scores_the_prompt(ours, ids):
    (choice,) = choices_of(ours.complete(ids, echo=True, logprobs=1, max_tokens=1))
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
    assert "".join(found["tokens"][:-1]) == PROMPT
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value <= 0 for value in found["token_logprobs"][1:])
    assert found["text_offset"][:2] == [0, 3]


def test_echo_without_new_tokens_only_scores(ours, ids):
    (choice,) = choices_of(ours.complete(PROMPT, echo=True, logprobs=1, max_tokens=0))
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert choice["finish_reason"] == "length"


def test_scores_of_a_prompt_do_not_depend_on_others(ours, ids):
    alone = choices_of(ours.complete(ids, echo=True, logprobs=1, max_tokens=1))[0]
    many = choices_of(ours.complete([ids[:3], ids, ids * 20], echo=True, logprobs=1, max_tokens=1))
    expected = alone["logprobs"]["token_logprobs"][1:]
    assert many[1]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert many[2]["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(expected[:-1], abs=1e-4)


def test_an_end_token_counts_among_the_scored(ours):
    """Clients drop the last entry, the generated one: it is there too where the model ends its text at once."""
    prompt = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    whole = text_of(ours.complete(prompt, max_tokens=60))
    ended = ours.post("/tokenize", prompt=prompt + whole, add_special_tokens=False).body["tokens"]
    (choice,) = choices_of(ours.complete(ended, max_tokens=1))
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    (choice,) = choices_of(ours.complete(ended, max_tokens=1, echo=True, logprobs=1))
    assert len(choice["logprobs"]["token_logprobs"]) == len(ended) + 1


def test_log_probabilities_of_a_prompt(ours, ids):
    answer = ours.complete(ids, prompt_logprobs=2, max_tokens=1)
    (choice,) = choices_of(answer)
    found = choice["prompt_logprobs"]
    echoed = choices_of(ours.complete(ids, echo=True, logprobs=1, max_tokens=1))[0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for token, top, expected in zip(ids[1:], found[1:], echoed[1:], strict=False):
        assert 2 <= len(top) <= 3
        assert top[str(token)]["logprob"] == pytest.approx(expected, abs=1e-4)


def test_a_stop_string(server):
    whole = text_of(server.complete(max_tokens=12))
    stop = whole[4:7]
    assert text_of(server.complete(max_tokens=12, stop=stop)) == whole[: whole.index(stop)]


def test_an_empty_list_of_stop_strings(server):
    assert text_of(server.complete(stop=[])) == text_of(server.complete())


def test_a_seed(server):
    first, second = (text_of(server.complete(temperature=1.5, seed=3, max_tokens=16)) for _ in range(2))
    assert first == second


def test_special_tokens_in_a_prompt_are_tokens(server):
    plain = server.complete("<|im_end|>", max_tokens=1).body["usage"]["prompt_tokens"]
    assert plain <= 2


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], {}, 5, [1.5], [-1], [10**9], [10**30], [True], [[1], [-2]]], ids=str
)
def test_prompts_that_are_none_are_refused(ours, prompt):
    answer = ours.complete(prompt)
    assert answer.status == 400
    assert (answer.error["param"] or "").startswith("prompt")


def test_an_empty_prompt_is_answered_or_refused(server):
    assert server.complete("").status in (200, 400)


def test_a_missing_prompt_is_refused(server):
    assert server.post("/v1/completions", max_tokens=3).status == 400


def test_a_suffix_is_refused_by_name(ours):
    assert ours.complete(suffix="x").error["param"] == "suffix"


def test_best_of_is_refused_unless_it_chooses_nothing(ours):
    assert ours.complete(best_of=1).status == 200
    assert ours.complete(best_of=4).error["param"] == "best_of"


def test_a_prompt_beyond_the_context_is_refused(server):
    answer = server.complete("word " * 3000)
    assert answer.status == 400
    assert answer.error


def test_as_many_prompts_as_wait_are_refused_or_served_never_lost(ours):
    answer = ours.complete([PROMPT] * 500, max_tokens=1)
    assert answer.status in (200, 400, 429)
    ours.wait_until_idle(60)
