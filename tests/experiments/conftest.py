"""Shared by the tests of the experiments: the command line, called in this process; pages of reports."""

import contextlib
import html
import io
import json
import re
import sys

import pytest


@pytest.fixture(scope="session")
def isoflop():
    """Call the command; (exit code, stdout, stderr)."""
    from experiments import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["isoflop", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="session")
def llama_folder(corpus, random_params, tmp_path_factory):
    """A random small Llama as a Hugging Face folder: a byte-level tokenizer with a begin token, a chat template."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

    from model import ModelConfig
    from model.convert import save_hf

    special = ["<s>", "</s>", "<|user|>"]
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train([str(file) for file in sorted(corpus.iterdir())[:3]], trainer)
    library.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = ModelConfig(
        vocab_size=320,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        d_ff=24,
        max_seq_len=96,
        tie_embeddings=False,
        eos_token_ids=(1,),
    )
    folder = tmp_path_factory.mktemp("llama")
    save_hf(config, random_params(config), folder)
    library.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<|user|>{% endif %}"
    roles = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles})
    )
    return folder


@pytest.fixture(scope="session")
def words():
    """page → what a reader sees of it, with plain spaces."""

    def visible(page: str) -> str:
        page = re.sub(r"<(style|svg|script).*?</\1>", " ", page, flags=re.DOTALL)
        return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))

    return visible


@pytest.fixture
def phone_figures(monkeypatch):
    """Collect the figures of a page that a phone shows, each checked: its text has ten CSS pixels or more.

    A phone of 390 pixels leaves 350 of them to a page.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: list[Figure] = []

    def checked(figure, label):
        if figure.get_figwidth() < 6:
            found.append(figure)
            texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
            assert min(text.get_fontsize() for text in texts) * 350 / figure.get_figwidth() / 72 >= 10, label
        return "[figure]"

    monkeypatch.setattr("experiments.report.page.inline", checked)
    return found


@pytest.fixture
def no_svg(monkeypatch):
    """Figures are made but not turned into SVG, which takes most of the time."""
    monkeypatch.setattr("experiments.report.page.inline", lambda figure, label: "[figure]")


@pytest.fixture(scope="session")
def write_metrics():
    """Leave a run's learning curve in its folder: 1024 tokens and 1e8 FLOPs a step."""

    def write(run, losses):
        run.mkdir(parents=True)
        with (run / "metrics.jsonl").open("w") as file:
            for step, loss in enumerate(losses, start=1):
                line = {"step": step, "tokens": 1024 * step, "flops_6nd": 1e8 * step, "loss": loss}
                file.write(json.dumps(line) + "\n")

    return write
