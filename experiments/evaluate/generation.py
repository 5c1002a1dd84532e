"""Generate the answers of a task in batches that share what their prompts have in common."""

import dataclasses
from collections.abc import Sequence

from experiments.evaluate.answers import TaskAnswers
from experiments.evaluate.encode import encode_contexts
from experiments.evaluate.scorers.registry import scorer
from experiments.evaluate.tasks.prompts import Prompt
from experiments.evaluate.tasks.task import Task
from infer import Sampling, generate
from model import Execution, ModelConfig, Params
from model.errors import InputError
from model.progress import progress_bar
from model.tokenizer import Tokenizer


def answer_by_generation(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 16,
) -> TaskAnswers:
    """Return a row per question: the generated answer and its scores by the task's scorer.

    Raises InputError, naming the question, if its prompt and answer do not fit the model's context.
    """
    contexts = [prompt.contexts[0] for prompt in prompts]
    ids = encode_contexts(tokenizer, contexts, encoder_decoder=config.stack == "encoder-decoder")
    truncated = 0
    room = config.max_seq_len if config.stack == "encoder-decoder" else config.max_seq_len - task.max_new_tokens
    for number, prompt in enumerate(ids):
        if len(prompt) > room:
            if task.truncate and room > 0:
                ids[number] = prompt[-room:]
                truncated += 1
                continue
            hint = "ask for fewer shots" if task.shots and not task.ready else "leave it out, or lower max_new_tokens"
            raise InputError(
                f"task {task.name}, question {prompts[number].question.id!r}: its {len(prompt):,} tokens and "
                f"{task.max_new_tokens} new ones do not fit the model's context of {config.max_seq_len:,}; {hint}"
            )
    outputs = generate_answers(
        config, params, tokenizer, ids, stop=task.stop, max_new_tokens=task.max_new_tokens, batch_size=batch_size
    )
    score = scorer(task.scorer).score
    rows = [
        {
            "id": prompt.question.id,
            "cluster": prompt.question.cluster,
            "prompt_sha256": prompt.sha256,
            "output": output.text,
            "finish_reason": output.finish_reason,
            "answers": list(prompt.question.answers),
            "metrics": score(output.text, prompt.question),
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return TaskAnswers(rows, truncated)


@dataclasses.dataclass(frozen=True)
class Output:
    """A generated answer. text: up to the stop string. finish_reason: "stop" or "length"."""

    text: str
    finish_reason: str


def generate_answers(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    execution: Execution = Execution(),
) -> list[Output]:
    """Return the most likely answer, token by token, to each prompt of token ids, in their order.

    An answer ends before a stop string, or at an end token of the config or the tokenizer.

    A prefix that the prompts of a batch share, such as fixed shots, is read once for the batch. Equal prompts are
    answered once. Prompts stay in their order, so that the batches have similar longest prompts and need few programs;
    the last batch is filled with earlier prompts for the same reason.
    Raises InputError for prompts that do not fit the context together with their answers, as `generate` does.
    """
    known = (*config.eos_token_ids, *tokenizer.eos_ids)
    ends = tuple(dict.fromkeys(token for token in known if token < config.vocab_size))
    greedy = Sampling(temperature=0.0, stop_strings=tuple(stop), stop_ids=ends)
    keys = [tuple(prompt) for prompt in prompts]
    order, found = list(dict.fromkeys(keys)), dict[tuple[int, ...], Output]()
    starts = range(0, len(order), batch_size)
    with progress_bar("generating", len(starts)) as advance:
        for start in starts:
            first = max(0, min(start, len(order) - batch_size))
            batch = order[first : first + batch_size]
            result = generate(
                config,
                params,
                batch,
                greedy,
                max_new_tokens=max_new_tokens,
                tokenizer=tokenizer,
                execution=execution,
            )
            assert result.text is not None
            for key, text, reason in zip(batch, result.text, result.finish_reason, strict=True):
                found.setdefault(key, Output(text, reason))
            advance()
    return [found[key] for key in keys]
