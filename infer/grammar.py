"""Constrain output to a JSON schema or a regular expression, with llguidance."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from infer.constraint import words_of
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer.token_bytes import token_bytes

MOST_CHARACTERS = 100_000  # of a schema or a regular expression
_KEPT = 64  # compiled grammars
# At 50,000 units of fuel per ms, compiling takes at most about 20 ms, and a mask about 15 ms.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Free white space lets a model write line ends until its limit. These separators are those of most text in JSON.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the right-hand side of a rule for `Grammars.lark`: JSON, spaced as by `Grammars.json_schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON})


class Grammars:
    """The compiler of grammars for one tokenizer. All methods may be called from any thread.

    A grammar that was compiled before costs a copy. Compiling and masks drop the interpreter's lock.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None, end_ids: Iterable[int] | None = None):
        """Read the tokenizer's vocabulary.

        vocab_size: of the model; None: the tokenizer's. Rows of the model without a token are never allowed. end_ids:
        tokens that end a text; None: the tokenizer's. Raises InputError if there are none.
        """
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        ends = tokenizer.eos_ids if end_ids is None else end_ids
        self.end_ids = sorted({token for token in ends if token < self.vocab_size})
        if not self.end_ids:
            raise InputError(
                f"the tokenizer {tokenizer.path} has no end token, which would end a constrained text; name it as "
                "eos_token in a tokenizer_config.json in its folder"
            )
        described = TokenizerWrapper(_Vocabulary(tokenizer, self.vocab_size, self.end_ids))
        self._tokenizer = LLTokenizer(described, n_vocab=self.vocab_size, eos_token=self.end_ids)
        self._limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any] | bool) -> "GrammarConstraint":
        """Return a constraint to JSON of a schema, with ", " and ": " between its parts and no other white space.

        Properties are written in the schema's order. Raises InputError for a schema that is damaged, too large, has
        keywords that cannot be enforced, or allows no text.
        """
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if not isinstance(schema, Mapping):
            raise InputError(f"a JSON schema must be an object, not {type(schema).__name__}")
        try:
            text = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the JSON schema is no JSON: {error}") from error
        _check_size("the JSON schema", text)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"the JSON schema is refused: {_one_line(error)}") from error
        return self._compile("the JSON schema", grammar)

    def json_object(self) -> "GrammarConstraint":
        """Return a constraint to any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "GrammarConstraint":
        """Return a constraint to texts that a regular expression matches as a whole.

        The syntax is that of Rust's regex crate: no look-around, no backreferences. Raises InputError for a pattern
        that is damaged, too large, or allows no text.
        """
        _check_size("the regular expression", pattern)
        return self._compile("the regular expression", LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str, name: str = "the grammar") -> "GrammarConstraint":
        """Return a constraint to a grammar in llguidance's form of Lark's. Raises InputError as the others do."""
        _check_size(name, grammar)
        return self._compile(name, LLMatcher.grammar_from_lark(grammar))

    def _compile(self, name: str, grammar: str) -> "GrammarConstraint":
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if compiled.is_error():
                raise InputError(f"{name} is refused: {_one_line(compiled.get_error())}")
            if not any(compiled.compute_bitmask()) or compiled.is_error():
                raise InputError(f"{name} is refused: no text of this vocabulary satisfies it")
            with self._lock:
                self._compiled[grammar] = compiled
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        return GrammarConstraint(compiled.deep_copy(), self.vocab_size, self.end_ids)


class GrammarConstraint:
    """The state of one text under a grammar; an `infer.constraint.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Iterable[int]):
        self._matcher, self._words = matcher, words_of(vocab_size)
        self._ends = np.zeros(self._words, np.uint32)
        self._end_ids = frozenset(end_ids)
        for token in self._end_ids:
            self._ends[token // 32] |= np.uint32(1 << token % 32)

    def mask(self) -> np.ndarray:
        """Return uint32 [ceil(vocab / 32)] of the tokens that may come next.

        Raises ValueError where the text cannot go on: the grammar's limits are passed, or no token has its next bytes.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return self._ends.copy()
        mask = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(f"the grammar allows nothing more: {_one_line(self._matcher.get_error())}")
        return mask

    def accept(self, token: int) -> None:
        """Append a token; an end token ends the text. Raises ValueError for a token that the mask does not allow."""
        if self._matcher.is_stopped() and token in self._end_ids:
            return
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} is not allowed here: {_one_line(self._matcher.get_error())}")

    @property
    def finished(self) -> bool:
        """True if nothing more may come but the end."""
        return self._matcher.is_stopped()


class _Vocabulary:
    """A vocabulary in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: list[int]):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        tokens = token_bytes(tokenizer)
        self.tokens = (tokens + [b""] * (vocab_size - len(tokens)))[:vocab_size]
        self.special_token_ids = sorted(i for i in {*tokenizer.special_tokens, *end_ids} if i < vocab_size)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _check_size(name: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{name} has {len(text):,} characters; give at most {MOST_CHARACTERS:,}")


def _one_line(error: object) -> str:
    return " ".join(str(error).replace("<non-verbose/>", "").split())[:500] or "unknown reason"
