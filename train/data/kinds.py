"""The kinds of data folders: text to pre-train on, and four kinds of examples to fine-tune on."""

from model.errors import InputError, UnknownNameError
from train.data.shards import TokenShards

KINDS = {
    "text": "documents of plain text",
    "chat": "conversations",
    "preference": "pairs of a chosen and a rejected answer",
    "rated": "answers labelled as good or bad",
    "prompts": "prompts without answers",
}
"""Contents of a folder of each kind."""


def check_known(kind: str) -> None:
    """Raise UnknownNameError where there is no such kind."""
    if kind not in KINDS:
        raise UnknownNameError("kind of data", kind, KINDS)


def check_kind(shards: TokenShards, *kinds: str) -> None:
    """Raise InputError where the folder is of none of these kinds; the message says which command the folder is for."""
    kind = shards.manifest.kind
    if kind in kinds:
        return
    command = "train" if kind == "text" else "tune"
    raise InputError(
        f"{shards.folder} is a data folder of kind={kind} ({KINDS.get(kind, 'unknown here')}), which is for"
        f" `isoflop {command}`; make one of kind={' or '.join(kinds)} with"
        f" `isoflop data prepare SOURCE --out FOLDER{'' if 'text' in kinds else ' --kind ' + kinds[0]}`"
    )
