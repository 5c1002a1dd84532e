"""Chat templates in the styles of public models, by hand and against Transformers."""

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from model.errors import InputError
from model.tokenizer import load_tokenizer

TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in (Path(__file__).parents[1] / "fixtures/chat").glob("*.jinja")
}
CHATML, LLAMA, GEMMA, MISTRAL = (TEMPLATES[name] for name in ("chatml", "llama", "gemma", "mistral"))

USER, ANSWER, THANKS = (
    {"role": "user", "content": " Is 1 < 2 & 'é' a letter? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "tool_calls": None},
    {"role": "user", "content": "Thanks\n"},
)
CONVERSATIONS = [
    [USER],
    [USER, ANSWER, THANKS],
    [{"role": "system", "content": "Be <b>short</b>."}, USER, ANSWER, THANKS],
]
TOOL = {"name": "add", "description": 'a + b, as "été" & <so on>', "parameters": {"b": [1.5, None], "a": {}}}
VARIABLES = [{}, {"tools": [TOOL]}, {"enable_thinking": False}, {"date_string": "1999"}]
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "[/INST]"]


def write(folder, template):
    """A model's folder whose words are single bytes and the marks of the templates."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(MARKS)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def render(tmp_path):
    def render(template, messages, **options):
        return load_tokenizer(write(tmp_path, template)).apply_chat_template(messages, **options)

    return render


def test_chatml(render):
    expected = "<|im_start|>user\nThanks\n<|im_end|>\n"
    assert render(CHATML, [THANKS], add_generation_prompt=False) == expected
    assert render(CHATML, [THANKS]) == expected + "<|im_start|>assistant\n"


def test_llama_style(render):
    expected = (
        f"<s><|start_header_id|>system<|end_header_id|>\n\nYear: {datetime.now():%Y}\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert render(LLAMA, [THANKS]) == expected


def test_lines_of_blocks_alone_leave_no_trace(render):
    assert render("a\n  {% if true %}\n  b\n  {% endif %}\nc", [USER]) == "a\n  b\nc"


def test_json_is_not_escaped_for_html(render):
    text = render("{{ tools | tojson }}", [USER], tools=[TOOL])
    assert json.loads(text) == [TOOL]
    assert 'été\\" & <so on>' in text


def test_a_key_without_a_value_is_not_there(render):
    assert render("{{ 'tool_calls' in messages[0] }}", [ANSWER]) == "False"


def test_special_tokens_of_the_prompt_are_read(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, MISTRAL))
    prompt = tokenizer.apply_chat_template([THANKS])
    ids = tokenizer.encode(prompt, special=True)
    assert ids[0] == tokenizer.bos_id
    assert len(ids) == len("Thanks\n") + 4  # begin, [INST], a space, [/INST]
    assert len(tokenizer.encode(prompt)) == len(prompt)


def test_refusals_are_one_sentence(render):
    def refused(match, template, messages, **options):
        with pytest.raises(InputError, match=match) as refusal:
            render(template, messages, **options)
        assert "\n" not in str(refusal.value)

    refused("refuses these messages: System role not supported", GEMMA, CONVERSATIONS[2])
    refused("refuses these messages: Conversation roles must alternate", GEMMA, [USER, USER])
    refused("damaged at line 2: .*unknown tag 'endfor'", "{% if true %}\n{% endfor %}", [USER])
    refused("refuses these messages: .*no attribute 'content'", "{{ messages[0].content + 'a' }}", [{"role": "user"}])
    refused("refuses these messages: .*concatenate", "{{ messages[0].content + 1 }}", [USER])
    refused("refuses these messages: .*unsafe", "{{ ''.__class__.__mro__ }}", [USER])
    refused("refuses these messages: .*(unsafe|not safely)", "{{ messages.append(1) }}", [USER])
    for messages in ([], "hi", {"role": "user", "content": "hi"}, ["hi"]):
        refused("messages must be a list of at least one", CHATML, messages)


# Reads cases from its standard input and writes what Transformers makes of them.
PROGRAM = """
import json, sys
from transformers import PreTrainedTokenizerFast
results = []
for folder, messages, prompt, variables in json.load(sys.stdin):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    options = dict(add_generation_prompt=prompt, **variables)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    except Exception as error:
        text, ids = None, str(error)
    results.append([text, ids])
print("RESULTS" + json.dumps(results))
"""


@pytest.mark.long
def test_templates_render_as_transformers_renders_them(tmp_path):
    python = os.environ.get("ISOFLOP_TRANSFORMERS_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("ISOFLOP_TRANSFORMERS_PYTHON names no Python that has Transformers")
    folders = {name: str(write(tmp_path / name, template)) for name, template in TEMPLATES.items()}
    cases = [
        (folder, messages, prompt, variables)
        for folder in folders.values()
        for messages in CONVERSATIONS
        for prompt in (True, False)
        for variables in VARIABLES
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", PROGRAM], input=json.dumps(cases), capture_output=True, text=True, check=True, env=environment
    )
    results = json.loads(done.stdout.split("RESULTS")[1])
    loaded = {folder: load_tokenizer(folder) for folder in folders.values()}
    for (folder, messages, prompt, variables), (text, ids) in zip(cases, results, strict=True):
        tokenizer = loaded[folder]
        if text is None:
            with pytest.raises(InputError) as refusal:
                tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **variables)
            assert ids in str(refusal.value)
        else:
            ours = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **variables)
            assert ours == text
            assert tokenizer.encode(ours, special=True) == ids
    assert sum(text is None for text, _ in results) == 2 * len(VARIABLES), "Gemma's refusals of a system turn"
