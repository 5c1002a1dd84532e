"""Write the documents of examples to their side of the split: tokens, the trained mask, and numbers beside them."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from model.errors import InputError
from model.tokenizer import Tokenizer
from train.data.examples.formats import EQUAL, TWO_PROMPTS, Example, UnusableError, as_turns, canonical
from train.data.examples.render import Encoded, Rendered, Renderer, encode
from train.data.manifest import ArrayFile, Split
from train.data.shards import ShardWriter
from train.files import file_sha256

TRUNCATED = "truncated documents"
LEFT_OUT = "assistant turns that the template renders differently later"
_ENCODE_AT_ONCE = 2**19  # characters
_MISMATCHES_AT_ONCE = 256


class Side:
    """One side of the split while it is written."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, stack: ExitStack):
        self._folder, self._split = folder, split
        self._tokens = stack.enter_context(ShardWriter(folder, split, dtype, shard_tokens))
        self._trained = stack.enter_context(ShardWriter(folder, split, np.dtype(np.uint8), shard_tokens, "trained"))
        self._ends: list[int] = []
        self._bytes = 0
        self.weights: list[float] = []
        self.margins: list[float | None] = []
        self.labels: list[int] = []
        self.trained_tokens = self.longest = 0

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._ends)

    @property
    def has_margins(self) -> bool:
        """True if any pair has a margin."""
        return any(margin is not None for margin in self.margins)

    def write(self, document: Encoded) -> None:
        """Append a document."""
        self._tokens.write(document.ids)
        self._trained.write(document.trained)
        self._ends.append((self._ends[-1] if self._ends else -1) + len(document.ids))
        self._bytes += document.bytes
        self.trained_tokens += int(document.trained.sum())
        self.longest = max(self.longest, len(document.ids))

    def finish_tokens(self) -> Split:
        """Complete the files of tokens."""
        return Split(self.documents, self._bytes, self._ends[-1] + 1, self._tokens.finish())

    def finish_arrays(self, kind: str, has_margins: bool) -> tuple[ArrayFile, ...]:
        """Complete and write what lies beside the tokens."""
        files = [ArrayFile(file.name, "uint8", file.tokens, file.sha256) for file in self._trained.finish()]
        files.append(self._save("ends", np.array(self._ends, np.int64)))
        if kind == "preference":
            files.append(self._save("weights", np.array(self.weights, np.float32)))
            if has_margins:
                margins = [0.0 if margin is None else margin for margin in self.margins]
                files.append(self._save("margins", np.array(margins, np.float32)))
        if kind == "rated":
            files.append(self._save("labels", np.array(self.labels, np.int32)))
        return tuple(files)

    def _save(self, name: str, values: np.ndarray) -> ArrayFile:
        path, content = self._folder / f"{name}-{self._split}.npy", io.BytesIO()
        np.save(content, values)
        path.write_bytes(content.getvalue())
        return ArrayFile(path.name, values.dtype.name, len(values), file_sha256(path))


class ExampleWriter:
    """Render and encode examples, many at once, and write each to the side of the split that its prompt belongs to.

    dropped, altered: counts of what gave no example and of what was kept with a reservation, by reason. first_refusal:
    what the chat template said to the first example that it refused.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        sides: dict[str, Side],
        max_tokens: int | None,
        validation_fraction: float,
    ):
        self._kind, self._tokenizer, self._sides, self._max_tokens = kind, tokenizer, sides, max_tokens
        self._renderer, self._bound = Renderer(tokenizer), int(validation_fraction * 2**64)
        self._rated: dict[str, list[tuple[Example, Encoded]]] = {split: [] for split in sides}
        self.dropped: Counter[str] = Counter()
        self.altered: Counter[str] = Counter()
        self.first_refusal = ""

    def write_all(self, rows: Iterable[list[Example]]) -> None:
        """Write the examples of all rows; those of kind=rated wait for `write_rated`."""
        waiting: list[list[tuple[Example, list[Rendered]]]] = []
        characters = 0
        for examples in rows:
            waiting.append([])
            for example in examples:
                try:
                    documents = self._render(example)
                except UnusableError as unusable:
                    self.dropped[unusable.reason] += 1
                    self.first_refusal = self.first_refusal or unusable.detail
                    continue
                waiting[-1].append((example, documents))
                characters += sum(len(document.text) for document in documents)
            if characters >= _ENCODE_AT_ONCE:
                self._encode(waiting)
                waiting, characters = [], 0
        self._encode(waiting)

    def write_rated(self) -> None:
        """Write each rated example and its mismatch: its prompt with the answer of the next one of another prompt."""
        for split, rated in self._rated.items():
            if rated:
                following = _next_of_another_prompt([canonical(example.prompt) for example, _ in rated], split)
                for start in range(0, len(rated), _MISMATCHES_AT_ONCE):
                    chunk = rated[start : start + _MISMATCHES_AT_ONCE]
                    others = [rated[i][0] for i in following[start : start + _MISMATCHES_AT_ONCE]]
                    self._write_with_mismatches(self._sides[split], chunk, others)

    def _write_with_mismatches(self, side: Side, rated: list[tuple[Example, Encoded]], others: list[Example]) -> None:
        kept, rendered = [], []
        for (example, document), other in zip(rated, others, strict=True):
            prompt, answer = example.prompt, other.answers[0]
            if isinstance(prompt, str) != isinstance(answer, str):
                prompt, answer = as_turns(prompt, "user"), as_turns(answer, "assistant")
            try:
                rendered.append(self._renderer.answer(prompt, answer, example.variables))
            except UnusableError as unusable:
                self.dropped[unusable.reason] += 1
                continue
            kept.append((example, document))
        mismatches = encode(self._tokenizer, rendered, self._max_tokens)
        for (example, document), mismatch in zip(kept, mismatches, strict=True):
            found = self._keep([mismatch])
            if found is not None:
                side.write(document)
                side.write(found[0])
                side.labels.append(example.label)

    def _render(self, example: Example) -> list[Rendered]:
        prompt, variables = example.prompt, example.variables
        if self._kind == "prompts":
            return [self._renderer.prompt(prompt, variables)]
        if self._kind == "chat" and not isinstance(prompt, str):
            turns = example.answers[0]
            assert not isinstance(turns, str)
            return [self._renderer.conversation([*prompt, *turns], len(prompt), variables)]
        return [self._renderer.answer(prompt, answer, variables) for answer in example.answers]

    def _encode(self, rows: list[list[tuple[Example, list[Rendered]]]]) -> None:
        """Encode the documents of rows and write them; a ranking's pairs share the weight of one."""
        rendered = [document for row in rows for _, documents in row for document in documents]
        encoded = iter(encode(self._tokenizer, rendered, self._max_tokens))
        for row in rows:
            kept = []
            for example, documents in row:
                results = [next(encoded) for _ in documents]
                if (found := self._keep(results)) is not None:
                    kept.append((example, found))
            for example, found in kept:
                self._add(example, found, 1 / len(kept))
                if example.prompts_differ:
                    self.altered[TWO_PROMPTS] += 1

    def _keep(self, results: list[Encoded | str]) -> list[Encoded] | None:
        """Return the documents of an example; None, and count why, where it cannot be used."""
        reasons = [result for result in results if isinstance(result, str)]
        documents = [result for result in results if not isinstance(result, str)]
        if not reasons and self._kind == "preference" and np.array_equal(documents[0].ids, documents[1].ids):
            reasons = [EQUAL]
        if reasons:
            self.dropped[reasons[0]] += 1
            return None
        for document in documents:
            self.altered[TRUNCATED] += document.truncated
            self.altered[LEFT_OUT] += document.left_out
        self.altered = +self.altered  # without zeros
        return documents

    def _add(self, example: Example, documents: list[Encoded], weight: float) -> None:
        digest = hashlib.sha256(example.split_by.encode()).digest()
        split = "validation" if int.from_bytes(digest[:8]) < self._bound else "train"
        if self._kind == "rated":
            self._rated[split].append((example, documents[0]))
            return
        side = self._sides[split]
        for document in documents:
            side.write(document)
        side.weights.append(weight)
        side.margins.append(example.margin)


def _next_of_another_prompt(prompts: list[str], split: str) -> list[int]:
    """Return for each prompt the place of the next one that differs, from the first on after the last."""
    if len(set(prompts)) < 2:
        raise InputError(
            f"the {split} split has answers to one prompt only, where kind=rated compares answers to different prompts;"
            " give more rows, or another validation_fraction"
        )
    count = len(prompts)
    following = [0] * count
    for i in reversed(range(2 * count)):
        place, after = i % count, (i + 1) % count
        following[place] = after if prompts[place] != prompts[after] else following[after]
    return following
