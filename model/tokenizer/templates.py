"""Chat templates for tokenizers that have none, by name or from a file."""

from pathlib import Path

from model.errors import InputError
from model.tokenizer.folder import read_text

CHATML = """\
{%- if tools %}
    {{- raise_exception("this template writes no tools; hermes does") }}
{%- endif %}
{%- if bos_token and bos_token != eos_token %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is not string %}
        {{- raise_exception("this template writes messages with a text as content, and no others") }}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>" }}
    {%- if message.role == "assistant" and eos_token != "<|im_end|>" %}
        {{- eos_token }}
    {%- endif %}
    {{- "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
"""
"""Turns between <|im_start|> and <|im_end|>. The tokenizer's end token ends what the assistant says, so that generation
stops there even where <|im_end|> is no token of the vocabulary."""
HERMES = """\
{%- if bos_token and bos_token != eos_token %}
    {{- bos_token }}
{%- endif %}
{%- if tools %}
    {{- "<|im_start|>system\n" }}
    {%- if messages[0].role == "system" %}
        {{- messages[0].content + "\n\n" }}
    {%- endif %}
    {{- "You may call these functions:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\nTo call one, answer with its name and its arguments as JSON:\n<tool_call>\n" }}
    {{- '{"name": <name>, "arguments": <arguments>}' + "\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- set shown = tools and messages[0].role == "system" %}
{%- for message in (messages[1:] if shown else messages) %}
    {%- if message.content is not string %}
        {{- raise_exception("this template writes messages with a text as content, and no others") }}
    {%- endif %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user\n<tool_response>\n" + message.content + "\n</tool_response><|im_end|>" }}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\n" + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- "\n" if message.content or not loop.first else "" }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>" }}
        {%- if message.role == "assistant" and eos_token != "<|im_end|>" %}
            {{- eos_token }}
        {%- endif %}
    {%- endif %}
    {{- "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
"""
"""ChatML with tools: their schemas in the system message, calls as JSON between <tool_call> and </tool_call>."""
TEMPLATES = {"chatml": CHATML, "hermes": HERMES}


def read_template(given: str | Path) -> str:
    """Return the chat template of a name in TEMPLATES, or that in a Jinja file.

    Raises InputError if there is no such file or it cannot be parsed.
    """
    if str(given) in TEMPLATES:
        return TEMPLATES[str(given)]
    file = Path(given)
    if not file.is_file():
        raise InputError(
            f"there is no chat template {given}; give a Jinja file, or one of these names: {', '.join(TEMPLATES)}"
        )
    from model.tokenizer.chat import check_template

    template = read_text(file)
    check_template(template, file)
    return template
