"""Text of a continuation is the difference of two decodings, in any tokenizer and in chunks of any size."""

import json

import numpy as np
import pytest
from text_tokenizers import TEXTS, byte_fallback, byte_level, extra_whitespaces, sentencepiece, wordpiece

from infer.completion import Completion
from infer.decode import FULL, RUNNING, Emitted
from infer.sampling import Sampling
from infer.text import Detokenizer, continuation_text
from model.tokenizer import load_tokenizer

KINDS = [sentencepiece, extra_whitespaces, byte_level, byte_fallback, wordpiece]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return load_tokenizer(folder)


def chunks(random, ids):
    """The ids in pieces of random sizes."""
    while ids:
        size = random.choice([1, 1, 2, 3, 8, 32])
        yield ids[:size]
        ids = ids[size:]


def streamed(random, tokenizer, prompt, ids, stops=()):
    """The detokenizer after all chunks; what it shows only ever grows, by what can be taken."""
    words, shown, taken = Detokenizer(tokenizer, prompt, stops), "", ""
    for chunk in chunks(random, ids):
        words.push(chunk)
        assert words.text.startswith(shown)
        shown = words.text
        if random.random() < 0.5:
            taken += words.take()
            assert taken == shown
    words.finish()
    assert words.text.startswith(shown)
    assert taken + words.take() == words.text
    return words


def difference(tokenizer, prompt, ids):
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assert whole.startswith(before)
    return whole[len(before) :]


def random_text(random, count):
    return "".join(random.choice(TEXTS, count))


def test_text_is_the_difference_of_two_decodings(tokenizer):
    random = np.random.default_rng(0)
    for _ in range(100):
        text = random_text(random, random.integers(1, 12))
        ids = tokenizer.encode(text)
        cut = int(random.integers(0, len(ids) + 1))
        while tokenizer.decode(ids[:cut]).endswith("\ufffd"):
            cut -= 1
        prompt, new = ids[:cut], ids[cut:]
        made = streamed(random, tokenizer, prompt, new).text
        assert made == difference(tokenizer, prompt, new) == continuation_text(tokenizer, prompt, new)


def test_the_text_of_any_ids_is_the_difference(tokenizer):
    """Of a model that was not trained: bytes that are no text, special tokens, ids without a token."""
    if b'"ByteFallback"' in tokenizer.path.read_bytes():
        pytest.skip("its decoder takes back characters that were shown when a later byte does not fit")
    random = np.random.default_rng(1)
    for _ in range(100):
        ids = random.integers(0, tokenizer.vocab_size, random.integers(1, 80)).tolist()
        cut = int(random.integers(0, len(ids)))
        prompt, new = ids[:cut], ids[cut:]
        before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
        made = streamed(random, tokenizer, prompt, [*new, tokenizer.vocab_size, 10**6]).text
        if whole.startswith(before):
            assert made == whole[len(before) :]
        else:  # the continuation completes a character that the prompt began
            assert whole.endswith(made)


def test_the_first_word_keeps_its_space(tmp_path):
    sentencepiece(tmp_path)
    words = load_tokenizer(tmp_path)
    time = words.encode("time")
    assert words.decode(time) == "time"
    assert continuation_text(words, words.encode("the people"), time) == " time"
    assert continuation_text(words, [], time) == "time"
    assert continuation_text(words, [1], time) == "time", "a begin token is no text"


def test_a_stop_string_cuts_where_it_begins(tokenizer):
    """1,000 random texts and sets of stop strings in random chunks: the same cut as in the whole text afterwards."""
    random = np.random.default_rng(2)
    found = 0
    for _ in range(200):
        ids = tokenizer.encode(random_text(random, random.integers(1, 12)))
        prompt = tokenizer.encode("the")
        text = difference(tokenizer, prompt, ids)
        stops = []
        for _ in range(random.integers(1, 4)):
            start = int(random.integers(0, max(len(text), 1)))
            stops.append(text[start : start + int(random.integers(1, 6))] or "?")
        expected = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
        words = streamed(random, tokenizer, prompt, ids, stops)
        assert words.text == expected
        if expected == text:
            continue
        found += 1
        kept = words.ids_before_stop
        assert difference(tokenizer, prompt, ids[:kept]).startswith(expected), "the ids hold the text"
        if kept:
            shorter = tokenizer.decode(prompt + ids[: kept - 1]).rstrip("\ufffd")
            assert len(shorter) < len(tokenizer.decode(prompt) + expected) or not expected, "and no id more than that"
    assert found > 50


def test_an_id_is_kept_where_it_reaches_into_the_stop(tmp_path):
    """ "Hello", " world.\\nNext" with the stop "\\n" is "Hello world."."""

    class Pieces:
        def decode(self, ids):
            return "".join(["Hello", " world.\nNext", "\n", "ab", "cd"][i] for i in ids)

    def cut(ids, *stops):
        words = Detokenizer(Pieces(), [0], stops)
        words.push(ids)
        words.finish()
        return words.text, words.ids_before_stop

    assert cut([0, 1], "\n") == ("Hello world.", 2)
    assert cut([0, 2, 0], "\n") == ("Hello", 1), "an id that begins with the stop gives nothing"
    assert cut([3, 4, 3], "bc") == ("a", 1), "over two ids"
    assert cut([3, 4, 3], "bcx") == ("abcdab", None)
    assert cut([3, 4, 3], "bcda", "cd") == ("a", 1), "what begins first, though the other was complete first"
    assert cut([3, 4, 0], "bcda", "cd") == ("ab", 1)
    assert cut([3, 4], "bcda", "cd") == ("ab", 1), "at the end, what could have begun earlier did not"


def test_special_tokens_can_be_stops(tokenizer):
    end = next(i for i, name in tokenizer.special_tokens.items() if name == "<|end|>")
    the, day = tokenizer.encode("the"), tokenizer.encode("day")
    for stop in ("<|end|>", "|end", f"<|end|>{tokenizer.decode(day)[:1]}"):
        words = Detokenizer(tokenizer, the, (stop,))
        words.push([*the, end, *day])
        words.finish()
        expected = difference(tokenizer, the, the)
        if stop == "<|end|>d" and difference(tokenizer, the, day)[0] != "d":
            expected = difference(tokenizer, the, the + day)  # " day": a space lies between
        assert words.text == expected, stop


def test_nothing_that_a_stop_string_may_take_is_shown(tokenizer):
    random = np.random.default_rng(3)
    prompt, ids = tokenizer.encode("the"), tokenizer.encode("the people of the time of day. " * 3)
    text, stop = difference(tokenizer, prompt, ids), "time of night"
    words = Detokenizer(tokenizer, prompt, (stop,))
    for done, token in enumerate(ids, 1):
        words.push([token])
        now = difference(tokenizer, prompt, ids[:done])
        assert now.startswith(words.text)
        assert len(now) - len(words.text) < len(stop)
        shown = stop.startswith(now[len(words.text) :])
        assert shown, "only what may be its beginning is held back"
    words.finish()
    assert words.text == text
    assert streamed(random, tokenizer, prompt, ids, (stop,)).text == text


class Counting:
    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def decode(self, ids):
        self.ids += len(ids)
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("stops", [(), ("\n\n\n", "?!")], ids=["plain", "stops"])
def test_the_cost_is_linear(tokenizer, stops):
    """At most three ids are decoded for each that comes, one by one. Bytes that are no text cost more, not growing."""
    random = np.random.default_rng(4)
    ids = tokenizer.encode(random_text(random, 3000).replace("\n\n", "\n"))[:2000]
    counting = Counting(tokenizer)
    words = Detokenizer(counting, [], stops)
    taken = []
    for token in ids:
        words.push([token])
        taken.append(words.take())
    words.finish()
    assert words.text == "".join(taken) + words.take() == tokenizer.decode(ids)
    assert counting.ids <= 3 * len(ids)

    junk = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
    costs = []
    for count in (500, 2000):
        counting = Counting(tokenizer)
        words = Detokenizer(counting, [], stops)
        for token in random.choice(junk[64:], count).tolist() if junk else []:
            words.push([token])
        words.finish()
        costs.append(counting.ids / count)
    assert costs[1] <= 1.5 * costs[0] + 1, costs


def emitted(ids, status):
    """What the device gives for one row: log-probability −i for id i."""
    ids = np.array([ids], np.int32).reshape(1, -1)
    none = np.zeros((1, ids.shape[1], 0), np.int32)
    return Emitted(
        tokens=ids, logprobs=-ids.astype(np.float32), top_ids=none, top_logprobs=none, status=np.array([status])
    )


def test_no_token_is_withdrawn_once_it_was_taken(tokenizer):
    """Text and tokens of all updates are those of the end, with stop strings that are found, almost found or not."""
    random = np.random.default_rng(5)
    stopped = 0
    for _ in range(200):
        ids = tokenizer.encode(random_text(random, 8))
        text = tokenizer.decode(ids)
        cut = random.integers(len(text) - 1)
        found, almost = text[cut : cut + random.integers(1, 6)], text[cut : cut + 3] + "#"
        stops = ((found,), (almost,), (found, almost))[random.integers(3)]
        ids += tokenizer.encode(random_text(random, 2))
        completion = Completion(Sampling(stop_strings=stops), Detokenizer(tokenizer, [], stops))
        updates = []
        for chunk in chunks(random, ids):
            completion.read(emitted(chunk, RUNNING), 0)
            updates.append(completion.take())
        completion.read(emitted([], FULL), 0)
        updates.append(completion.take())
        stopped += completion.finish_reason == "stop"
        assert "".join(update.text for update in updates) == completion.text
        for name in ("tokens", "logprobs", "top_logprobs"):
            assert [one for update in updates for one in getattr(update, name)] == getattr(completion, name)
        assert not any(stop in completion.text for stop in stops)
    assert 100 < stopped < 170


def test_a_document_of_a_result_is_json(tokenizer):
    made = continuation_text(tokenizer, [], tokenizer.encode("é 日 👩"))
    assert json.loads(json.dumps(made)) == made
