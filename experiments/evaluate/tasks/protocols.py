"""Name the protocols of several tasks: what they share, whichever questions they ask.

lm-eval: prompts, metrics and token boundary of lm-evaluation-harness 0.4.13. smollm2: those of the evaluation of
SmolLM2 with lighteval. isoflop: the prompts of lm-eval, with the token boundary at the longest common prefix. olmes:
the ready requests of OLMES, unchanged.
"""

from typing import Any

ISOFLOP = "isoflop"
LM_EVAL = "lm-eval"
SMOLLM2 = "smollm2"
OLMES = "olmes"


def shared_fields(protocol: str) -> dict[str, Any]:
    """Return the fields of `Task` that a protocol has for each of its tasks."""
    return {"protocol": protocol} | _FIELDS.get(protocol, _FIELDS[LM_EVAL])


_FIELDS: dict[str, dict[str, Any]] = {
    ISOFLOP: {"boundary": "common-prefix"},
    LM_EVAL: {"boundary": "lm-eval", "truncate": True},
    SMOLLM2: {"boundary": "lm-eval", "chat_delimiter": " "},
}
