"""Implement `isoflop chat`: a conversation with a model in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.commands.options import BasePath, data_file, need_serving

if TYPE_CHECKING:
    from infer.sampling import Sampling
    from infer.serve.served import Served

_HELP = """\
/system TEXT   set the system prompt; alone, show it; /system none removes it
/retry         answer the last message again
/undo          remove the last message and its answer
/save FILE     write the conversation: Markdown if FILE ends in .md, else JSON
/help          show this
/exit          end, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer; what was written of it stays."""
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}")


def chat(
    model: tyro.conf.Positional[str],
    *,
    system: str = "",
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    max_tokens: int = 1024,
    seed: Annotated[int | None, tyro.conf.arg(metavar="SEED")] = None,
    tokenizer: Path | None = None,
    chat_template: str | None = None,
    base: BasePath = None,
    capacity: int = 4096,
    weights: Literal["float32", "bfloat16", "int8", "int8-dynamic", "int4"] = "float32",
    cache: Literal["float32", "bfloat16", "int8"] | None = None,
) -> None:
    """Talk to a model in the terminal.

    Example: isoflop chat model.gguf --weights int8

    Example: isoflop chat runs/tuned --system "Answer in one sentence." --temperature 0

    Commands: /system TEXT, /retry, /undo, /save FILE, /help, /exit. Ctrl-C stops an answer. When the conversation is
    longer than the model's window, the oldest turns are left out, and a line says so.

    Args:
        model: A run directory, a Hugging Face folder or a GGUF file.
        system: The system prompt.
        temperature: 0 is greedy.
        top_p: Keep the smallest set of tokens with this probability; 1 keeps all.
        top_k: Keep the k most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this fraction as probable as the most likely one; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens seen before; 1 changes nothing.
        presence_penalty: Subtract this from the logits of tokens in the answer.
        frequency_penalty: Subtract this for every time a token occurs in the answer.
        max_tokens: Most tokens of an answer; 0 for what fits.
        seed: Of the first answer, one more for each further one; by default they differ every time.
        tokenizer: The model's tokenizer (a file, or a folder such as the data's), if the model's folder has none.
        chat_template: A template's name, such as chatml, or a file, in place of the tokenizer's own.
        base: The new path of a run's base weights, if they were moved (for a run that stores only what it trained).
        capacity: Most tokens of the conversation that the model sees; at most its context.
        weights: Precision in which the weights are read.
        cache: Precision of the cache; by default that of the computation.
    """
    import sys

    need_serving("chat")
    from experiments.models import need_tokenizer
    from infer.sampling import Sampling
    from infer.serve.served import Registry, open_served
    from model.errors import InputError
    from model.progress import say

    drawn: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    if max_tokens < 0:
        raise InputError(f"--max-tokens={max_tokens} must be at least 1, or 0 for what fits")
    sampling = Sampling(**drawn)
    say(f"loading {model}")
    options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": chat_template, "base": base}
    served = open_served(model, slots=1, capacity=capacity, weights=weights, cache_dtype=cache, **options)
    if served.service is None:
        raise InputError(f"{model} is an encoder, which does not write text; give a language model")
    if need_tokenizer(served.tokenizer, Path(model)).chat_template is None:
        raise InputError(
            f"{model} has no chat template, so it was not trained to answer messages; give --chat-template chatml to "
            "try, or use isoflop generate"
        )
    with Registry([served]):
        _Conversation(served, system, sampling, max_tokens or None, seed).run(
            sys.stdin.isatty() and sys.stdout.isatty()
        )


class _Conversation:
    """A conversation: turns of the user and the model, and what the commands do with them."""

    def __init__(self, served: "Served", system: str, sampling: "Sampling", max_tokens: int | None, seed: int | None):
        from infer.serve.window import Turn

        self.served, self.system, self.sampling, self.max_tokens = served, system, sampling, max_tokens
        self.seed, self.answers = seed, 0
        self.turns: list[Turn] = []
        self.dropped = 0  # turns that the last answer was written without
        self.saved: set[Path] = set()  # files that this conversation may overwrite

    def run(self, interactive: bool) -> None:
        """Read lines until the end of standard input or /exit. interactive: with a prompt, history and notes."""
        from infer.serve.errors import ApiError
        from model.errors import InputError

        if interactive:
            _use_history()
            print(f"{self.served.name}, window of {self.served.capacity:,} tokens. /help shows the commands.")
        while True:
            try:
                line = self._read(interactive)
            except EOFError:
                break
            except KeyboardInterrupt:  # while a line is edited
                print("\n(Ctrl-D or /exit ends)")
                continue
            try:
                if line.strip() in ("/exit", "/quit"):
                    break
                if line.startswith("/"):
                    name, _, rest = line[1:].partition(" ")
                    self._command(name.strip(), rest.strip(), interactive)
                elif line.strip():
                    self._say(line, interactive)
            except (ApiError, InputError) as error:
                print(f"({error})")
        if interactive:
            print()

    def _read(self, interactive: bool) -> str:
        """Return the next message. A line that ends in a backslash goes on in the next one."""
        lines = [input("> " if interactive else "")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input("… " if interactive else ""))
        if not interactive:
            print("> " + "\n… ".join(lines))
        return "\n".join(lines)

    def _say(self, content: str, interactive: bool) -> None:
        from infer.serve.window import Turn

        self.turns.append(Turn(len(self.turns), "user", content))
        try:
            self._answer(interactive)
        except BaseException:
            self.turns.pop()
            raise

    def _command(self, name: str, rest: str, interactive: bool) -> None:
        from model.errors import InputError

        if name == "help":
            print(_HELP)
        elif name == "system":
            if rest:
                self.system = "" if rest == "none" else rest
            print(f"(system prompt: {self.system or 'none'})")
        elif name == "undo":
            if not self.turns:
                raise InputError("there is nothing to undo")
            del self.turns[-2:]
            last = self.turns[-2].content if self.turns else None
            print("(the conversation is empty)" if last is None else f"(the last message is now: {last})")
        elif name == "retry":
            if not self.turns:
                raise InputError("there is nothing to answer again")
            old = self.turns.pop()
            try:
                self._answer(interactive)
            except BaseException:
                self.turns.append(old)
                raise
        elif name == "save":
            self._save(rest)
        else:
            raise InputError(f"there is no command /{name}; /help shows them")

    def _answer(self, interactive: bool) -> None:
        """Have the last message answered, print the answer as it is written, and append it."""
        import asyncio

        from experiments.words import counted, is_or_are
        from infer.serve.window import Turn

        text, tokens, seconds, stopped = asyncio.run(self._write())
        print(" (stopped)" if stopped else "")
        self.turns.append(Turn(len(self.turns), "assistant", text))
        if interactive:
            speed = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds else ""
            print(f"({counted(tokens, 'token')}{speed})")
        if self.dropped:
            messages = counted(self.dropped, "oldest message")
            print(f"(the {messages} {is_or_are(self.dropped)} outside of the window; this answer was written without)")

    async def _write(self) -> tuple[str, int, float, bool]:
        """Print an answer; return it, its tokens, the seconds from the first to the last, and if Ctrl-C stopped it."""
        import asyncio
        import dataclasses
        import signal
        import time

        from infer.serve.generation import engine_seed, run
        from infer.serve.window import fit

        served = self.served
        fitted = await fit(served, self.system, self.turns, self.max_tokens, again=False)
        self.dropped = len(fitted.dropped)
        seed = engine_seed(None if self.seed is None else self.seed + self.answers)
        self.answers += 1
        sampling = dataclasses.replace(self.sampling, seed=seed, stop_ids=served.end_ids)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        text, tokens, first, seconds, stopped = "", 0, 0.0, 0.0, False
        with await run(served, [fitted.prompt], sampling, fitted.room) as generation:
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            try:
                async for ready in generation:
                    for _, update in ready:
                        text += update.text
                        tokens += len(update.tokens)
                        first = first or time.perf_counter()
                        seconds = time.perf_counter() - first
                        print(update.text.translate(_CONTROL), end="", flush=True)
            except asyncio.CancelledError:
                stopped = True
            finally:
                loop.remove_signal_handler(signal.SIGINT)
        return text, tokens, seconds, stopped

    def _save(self, given: str) -> None:
        import json

        from infer.serve.tree import markdown
        from model.errors import InputError

        if not given:
            raise InputError("give a file: /save chat.md, or /save chat.json")
        path = Path(given).expanduser()
        if path.exists() and path.resolve() not in self.saved:
            raise InputError(f"{path} exists; give another name")
        if path.suffix == ".md":
            names = {"user": "User", "assistant": f"Assistant ({self.served.name})"}
            data = markdown("Conversation", self.system, [(names[turn.role], turn.content) for turn in self.turns])
        else:
            rows = [{"role": "system", "content": self.system}] if self.system else []
            rows += [{"role": turn.role, "content": turn.content} for turn in self.turns]
            data = json.dumps({"model": self.served.name, "messages": rows}, ensure_ascii=False, indent=2) + "\n"
        try:
            path.write_text(data, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give another name") from None
        self.saved.add(path.resolve())
        print(f"(saved to {path})")


def _use_history() -> None:
    """Let lines be edited, and keep them for the next conversation."""
    import atexit
    import contextlib

    try:
        import readline
    except ImportError:  # a Python without it
        return
    file = data_file("chat-history")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
        readline.set_history_length(1000)
        atexit.register(_write_history, file)


def _write_history(file: Path) -> None:
    import contextlib
    import readline

    with contextlib.suppress(OSError):  # of a disk that is full; the conversation is more important
        readline.write_history_file(file)
