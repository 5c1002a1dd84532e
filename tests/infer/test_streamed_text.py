"""Text taken from a completion while its tokens arrive is the text of the whole, cut at the first stop string."""

import numpy as np
import pytest
from text_tokenizers import TEXTS, byte_fallback, sentencepiece

from infer.completion import Completion, detokenizer
from infer.decode import FULL, RUNNING, STOPPED, Emitted
from infer.sampling import Sampling
from model.tokenizer import load_tokenizer

ROOM = 32  # columns of one call
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module", params=[sentencepiece, byte_fallback], ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path_factory):
    """Two tokenizers that write unknown characters as bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return load_tokenizer(folder)


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.ids = tokenizer, 0, 0

    def decode(self, ids):
        self.calls, self.ids = self.calls + 1, self.ids + len(ids)
        return self.tokenizer.decode(ids)


def emitted(ids, status):
    """One call's output arrays, as the device returns them: a row of another request above this one."""
    tokens = np.full((2, ROOM), -1, np.int32)
    tokens[0, : ROOM // 2], tokens[1, : len(ids)] = 7, ids
    logprobs = np.where(tokens >= 0, -tokens.astype(np.float32), 0)
    return Emitted(tokens, logprobs, tokens[..., None], logprobs[..., None], np.array([RUNNING, status]))


def updates(decoder, prompt, ids, sampling, sizes, reason):
    """The updates of a completion whose ids arrive in chunks of these sizes, and the completion."""
    completion, taken = Completion(sampling, detokenizer(decoder, prompt, sampling)), []
    done = 0
    for size in sizes:
        done, start = min(done + size, len(ids)), done
        completion.read(emitted(ids[start:done], reason if done == len(ids) else RUNNING), 1)
        taken.append(completion.take())
        if completion.finish_reason is not None:
            break
    return taken, completion


def cut(text, stops):
    """The text before the stop string that begins first."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def difference(tokenizer, prompt, ids):
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assert whole.startswith(before)
    return whole[len(before) :]


def whole_characters(tokenizer, ids):
    """The first of these ids whose text ends with a whole character."""
    return next(
        ids[:count] for count in range(len(ids), -1, -1) if not tokenizer.decode(ids[:count]).endswith("\ufffd")
    )


def draw(random, tokenizer):
    """A prompt, the ids of a random text, up to four stop strings of which most occur in it, and chunk sizes."""
    prompt = tokenizer.encode(str(random.choice(["the", "", "é", "the people "])))
    ids = tokenizer.encode("".join(random.choice(TEXTS, random.integers(1, 12))))
    if random.random() < 0.2:  # the limit of tokens falls anywhere, in the middle of a character too
        ids = ids[: int(random.integers(1, len(ids) + 1))]
        if b'"ByteFallback"' in tokenizer.path.read_bytes():  # its decoder takes back whole characters before a part
            ids = whole_characters(tokenizer, ids)
    text, stops = difference(tokenizer, prompt, ids), []
    for _ in range(random.integers(0, 5)):
        start = int(random.integers(0, max(len(text), 1)))
        stops.append(text[start : start + int(random.integers(1, 7))] + str(random.choice(["", "", "", "?"])) or "?")
    sizes = random.choice([1, 1, 1, 2, 3, 8, 32], len(ids)).tolist()
    return prompt, ids, tuple(stop for stop in stops if REPLACEMENT not in stop), sizes


def test_streamed_is_whole_is_cut(tokenizer):
    """1,000 texts, sets of stop strings and chunkings over the two tokenizers; the ids belong to their texts."""
    random = np.random.default_rng(0)
    stopped = 0
    for _ in range(500):
        prompt, ids, stops, sizes = draw(random, tokenizer)
        sampling = Sampling(stop_strings=stops, logprobs=1)
        expected = cut(difference(tokenizer, prompt, ids), stops)
        taken, completion = updates(tokenizer, prompt, ids, sampling, sizes, FULL)
        [*_, whole], at_once = updates(tokenizer, prompt, ids, sampling, [ROOM] * len(ids), FULL)

        assert "".join(update.text for update in taken) == completion.text == expected == at_once.text
        assert [token for update in taken for token in update.tokens] == completion.tokens == at_once.tokens
        assert completion.tokens == ids[: len(completion.tokens)]
        assert [-value for update in taken for value in update.logprobs] == completion.tokens
        assert [list(top) for update in taken for top in update.top_logprobs] == [[i] for i in completion.tokens]

        reason = "stop" if any(stop in difference(tokenizer, prompt, ids) for stop in stops) else "length"
        assert [update.finish_reason for update in taken] == [None] * (len(taken) - 1) + [reason]
        assert whole.finish_reason == reason
        stopped += reason == "stop"
        if not difference(tokenizer, prompt, ids).endswith(REPLACEMENT):
            assert not any(REPLACEMENT in update.text for update in taken)
    assert 150 < stopped < 400, "both ends occur often"


def test_an_update_never_ends_within_a_character(tokenizer):
    """Ids one by one: each update is the whole text so far, up to its last whole character."""
    text = "日本語 é 👩‍👩‍👧 ok the people"
    prompt, ids = tokenizer.encode("the"), tokenizer.encode(text)
    taken, _ = updates(tokenizer, prompt, ids, Sampling(), [1] * len(ids), STOPPED)
    shown = ""
    for done, update in enumerate(taken, 1):
        shown += update.text
        assert shown == difference(tokenizer, prompt, whole_characters(tokenizer, ids[:done]))
    assert shown == difference(tokenizer, prompt, ids)


def test_held_back_text_is_shorter_than_the_longest_stop(tokenizer):
    """What arrived and is not shown could still become a stop string: at most its length − 1."""
    random = np.random.default_rng(1)
    for _ in range(100):
        prompt, ids, stops, _ = draw(random, tokenizer)
        completion = Completion(sampling := Sampling(stop_strings=stops), detokenizer(tokenizer, prompt, sampling))
        shown = ""
        for done, token in enumerate(ids, 1):
            completion.read(emitted([token], RUNNING), 1)
            update = completion.take()
            shown += update.text
            if completion.finish_reason is not None:
                break
            arrived = difference(tokenizer, prompt, whole_characters(tokenizer, ids[:done]))
            held = arrived[len(shown) :]
            assert arrived.startswith(shown)
            assert len(held) <= max(map(len, stops), default=1) - 1
            assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("stops", [(), ("\n\n\n", "?!")], ids=["plain", "stops"])
def test_the_cost_of_streaming_is_linear(tokenizer, stops):
    """2,000 tokens one by one decode at most three times as many ids, in at most three calls a token."""
    random = np.random.default_rng(2)
    texts = [text for text in TEXTS if "\n" not in text]
    ids = whole_characters(tokenizer, tokenizer.encode("".join(random.choice(texts, 3000)))[:2000])
    assert len(ids) > 1990
    counting = Counting(tokenizer)
    taken, completion = updates(counting, [], ids, Sampling(stop_strings=stops), [1] * len(ids), FULL)
    assert "".join(update.text for update in taken) == completion.text == tokenizer.decode(ids)
    assert counting.ids <= 3 * len(ids), f"{counting.ids / len(ids):.2f} ids decoded a token"
    assert counting.calls <= 3 * len(ids)
