"""Let lm-evaluation-harness drive our models through its own interface, without PyTorch.

From Python: `lm_eval.simple_evaluate(model=HarnessModel("runs/first"), tasks=["arc_easy"])`. From the command line,
with all options of `lm_eval run`:

    python -m experiments.evaluate.harness --model_args pretrained=runs/first --tasks arc_easy
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from experiments.models import need_tokenizer
from infer import Sampling, generate, prepare, score
from model import Execution, accounting
from model.dtypes import DTypeLike
from model.errors import InputError, check_at_least_one
from model.sharding import make_mesh, parse_mesh
from model.store import open_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise InputError(f"lm-evaluation-harness cannot be imported ({error}); install isoflop[eval]") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "isoflop"
"""The model's name in lm-evaluation-harness, after `register`."""
_BATCH_SIZE = 16
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ScoreRequest = tuple[Any, list[int], list[int]]
"""(key of the answer in lm-evaluation-harness's cache, ids of the context, ids of the continuation)."""


class HarnessModel(TemplateLM):
    """A run, a Hugging Face folder or a GGUF file as a model of lm-evaluation-harness.

    Texts are encoded and cut at lm-evaluation-harness's own boundary, as by its Hugging Face backend: names of special
    tokens are read as these tokens, the tokens that the model expects around a text are added, and an empty context
    becomes the begin token, or the end token of a model without one. Rows past the context lose tokens on the left.

    With several processes each is given all requests, and their devices share the work over `mesh`; the results are
    returned in process 0 only.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        tokenizer: str | Path | None = None,
        base: str | Path | None = None,
        weights: DTypeLike = "float32",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        mesh: Mapping[str, int] | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Open the model; for `pretrained`, `tokenizer` and `base` see `model.store.open_model`.

        weights: precision for generation and scoring, see `infer.prepare`. batch_size: rows of a pass; None or "auto":
        a default. max_length: tokens that a row may have; None: the model's context. max_gen_toks: new tokens where a
        task names no number. add_bos_token: whether the tokens around a text are added; None: unless the text begins
        with the begin token. prefix_token_id: stands for an empty context. seed: of tasks that sample. mesh: devices,
        such as "data=2". device, max_batch_size: not read; JAX chooses the device, or JAX_PLATFORMS=cpu does.
        Raises InputError if the model cannot be opened, has no tokenizer, or if an option is out of range.
        """
        super().__init__()
        self.path = Path(pretrained)
        opened = open_model(pretrained, tokenizer, base)
        self.config, self.tokenizer = opened.config, need_tokenizer(opened.tokenizer, pretrained)
        self.backend = "seq2seq" if self.config.stack == "encoder-decoder" else "causal"
        shape = parse_mesh(mesh) if isinstance(mesh, str) else mesh
        self.execution = Execution(mesh=dict(shape) if shape else None)
        over = make_mesh(self.execution.mesh) if self.execution.mesh else None
        self.params = prepare(self.config, opened.params, weights, mesh=over)
        self.batch_size = _batch_size(batch_size)
        self.max_gen_toks, self.seed, self.add_bos_token = int(max_gen_toks), int(seed), add_bos_token
        self.max_length = int(max_length or self.config.max_seq_len)
        check_at_least_one(max_gen_toks=self.max_gen_toks, max_length=self.max_length)
        if self.max_length > self.config.max_seq_len:
            raise InputError(f"max_length={self.max_length} exceeds the model's max_seq_len={self.config.max_seq_len}")
        self._prefix_token_id = prefix_token_id
        self._encoded: dict[tuple[str, bool], list[int]] = {}
        if jax.process_count() > 1:  # by which lm-evaluation-harness knows that another process returns the results
            os.environ["LOCAL_RANK"] = str(jax.process_index())

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises InputError if neither tokenizer nor config has one."""
        ids = (*self.tokenizer.eos_ids, *self.config.eos_token_ids)
        if not ids:
            raise InputError(f"{self.path} has no end token; name it as eos_token in its tokenizer_config.json")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: the begin token, or the end token if there is none."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's path, under which lm-evaluation-harness caches requests."""
        return str(self.tokenizer.path.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the model's chat template; None without one, or if `chat_template` is False."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation; without a generation prompt it ends with its last message."""
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-evaluation-harness records of a model beside the results."""
        return {
            "model_source": NAME,
            "model_num_parameters": accounting.parameters(self.config).total,
            "model_dtype": self.config.compute_dtype,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; add_special_tokens: add the tokens around it, None: as the class describes."""
        added = self._adds_tokens(string) if add_special_tokens is None else add_special_tokens
        found = self._encoded.get((string, added))
        return found or self.tokenizer.encode(string, special=True, add_special_tokens=added)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self.tokenizer.decode(tokens)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability and whether greedy decoding would give it."""
        texts: dict[tuple[str, bool], None] = {}
        for request in requests:
            context, continuation = request.args
            if context:
                whole, alone = context + continuation, context.rstrip()
                texts[whole, self._adds_tokens(whole)] = texts[alone, self._adds_tokens(alone)] = None
            else:
                texts[continuation, False] = None
        # All texts are encoded at once, by several threads; `tok_encode` then finds them here.
        for added in (False, True):
            keys = [key for key in texts if key[1] == added]
            ids = self.tokenizer.encode_batch([text for text, _ in keys], special=True, add_special_tokens=added)
            self._encoded.update(zip(keys, ids, strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._encoded = {}

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return each text's log-probability, in rows as long as the context allows; every token is scored once."""
        rows: list[_ScoreRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                rows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(rows), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[_ScoreRequest], **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitted(number, *request) for number, request in enumerate(requests)]
        found = score(self.config, self.params, pairs, batch_size=self.batch_size, execution=self.execution)
        answers = list(zip(found.logprobs.tolist(), found.greedy.tolist(), strict=True))
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def _fitted(
        self, number: int, texts: Any, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return the ids without those at the left that do not fit the context. Raises InputError if none are left."""
        if not continuation:
            raise InputError(
                f"request {number}, {texts!r:.100}, has a continuation without a token of its own: the boundary of "
                "lm-evaluation-harness gives all its tokens to the context"
            )
        if self.backend == "seq2seq":
            return context[-self.max_length :], continuation[-self.max_length :]
        if len(continuation) > self.max_length:
            raise InputError(
                f"request {number}, {texts!r:.100}, has a continuation of {len(continuation)} tokens, more than "
                f"max_length={self.max_length}; shorten it"
            )
        row = ((context or [self.prefix_token_id]) + continuation)[
            -(self.max_length + 1) :
        ]  # the last token is predicted, not read
        return row[: -len(continuation)], continuation

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return each prompt's continuation up to the first of its stop strings, greedy unless the task samples."""
        prompts, samplings, limits = [], [], []
        for number, request in enumerate(requests):
            prompt, options = request.args
            sampling, limit = self._generation(number, options)
            prompts.append(self._prompt(prompt, limit))
            samplings.append(sampling)
            limits.append(limit)
        texts: list[str] = [""] * len(requests)
        # Rows of a batch stop at the same number of new tokens, and have about the same length.
        order = sorted(range(len(requests)), key=lambda number: (limits[number], -len(prompts[number])))
        while order:
            batch = [number for number in order[: self.batch_size] if limits[number] == limits[order[0]]]
            del order[: len(batch)]
            made = generate(
                self.config,
                self.params,
                [prompts[number] for number in batch],
                [samplings[number] for number in batch],
                max_new_tokens=limits[batch[0]],
                tokenizer=self.tokenizer,
                execution=self.execution,
            )
            for number, text in zip(batch, made.text or (), strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _generation(self, number: int, options: Mapping[str, Any]) -> tuple[Sampling, int]:
        """Return (settings, most new tokens) of a request. Raises InputError for an option that we do not have."""
        given = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        stops = tuple(filter(None, given.pop("until")))
        limit, samples = given.pop("max_gen_toks"), given.pop("do_sample", False)
        unknown = sorted(set(given) - set(_SAMPLING))
        if unknown:
            raise InputError(
                f"the generation option {unknown[0]}={given[unknown[0]]!r} is not supported; give until, max_gen_toks, "
                f"do_sample, {', '.join(_SAMPLING)}"
            )
        values = given if samples else {"temperature": 0.0}
        ends = tuple(dict.fromkeys((self.eot_token_id, *self.config.eos_token_ids)))
        return Sampling(**values, stop_strings=stops, stop_ids=ends, seed=(self.seed + number) % 2**32), limit

    def _prompt(self, text: str, limit: int) -> list[int]:
        """Return the ids of a prompt, without those at the left that leave no room for `limit` new tokens."""
        room = self.max_length if self.backend == "seq2seq" else self.max_length - limit
        if room < 1:
            raise InputError(
                f"max_gen_toks={limit} leaves no room for a prompt in max_length={self.max_length}; lower it"
            )
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def _adds_tokens(self, text: str) -> bool:
        """Return whether the tokens around a text are added to it: not to one that begins with the prefix token."""
        if has_bos_prefix(text, self.tokenizer.special_tokens.get(self.prefix_token_id)):
            return False
        return True if self.add_bos_token is None else self.add_bos_token


def _batch_size(given: int | str | None) -> int:
    if given is None or str(given).startswith("auto"):
        return _BATCH_SIZE
    try:
        size = int(given)
    except ValueError:
        raise InputError(f'batch_size={given!r} is neither a number nor "auto"') from None
    check_at_least_one(batch_size=size)
    return size


def register() -> None:
    """Make the model known to lm-evaluation-harness by its name, `isoflop`."""
    if NAME not in model_registry:
        model_registry.register(NAME, target="experiments.evaluate.harness:HarnessModel")


def main() -> None:
    """Run lm-evaluation-harness's command line with our model, unless another is named."""
    from lm_eval.__main__ import cli_evaluate

    register()
    words = [word.partition("=")[0] for word in sys.argv[1:]]
    if "--model_args" in words or "-a" in words:  # it is a run, not `ls` or `validate`
        if "--model" not in words and "-M" not in words:
            sys.argv += ["--model", NAME]
        if "--batch_size" not in words and "-b" not in words:
            sys.argv += ["--batch_size", "auto"]
    cli_evaluate()


if __name__ == "__main__":
    main()
