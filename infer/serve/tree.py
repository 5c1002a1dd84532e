"""Conversations as trees of messages: what is stored and how it is read and changed.

Functions take the connection of `infer.serve.store.Store`, which runs each in a transaction. A message's children are
the alternatives that follow it; editing and regenerating add one, and nothing is overwritten. The branch that is shown
ends in the conversation's leaf.
"""

import re
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from infer.serve.errors import ApiError

PARTIAL = "partial"
"""Finish reason of an answer until it ends; it stays if the server stops or the client leaves in its midst."""

_LARGEST_ID = 2**63 - 1
_MOST_LISTED = 1000
_TITLE_LENGTH = 60


class StoredMessage(Struct, kw_only=True):
    """A message of a tree.

    parent: None for the first. siblings: ids of the messages with the same parent, itself included, oldest first.
    finish_reason: of an answer, "stop", "length", "content_filter", "cancelled" (stopped by the user), "error" or
    "partial". dropped: ids of messages that were left out of the prompt, as the window had no room for them. Times in
    seconds; created: since 1970; seconds: from the request to the last token, of all requests if it was continued.
    """

    id: int
    parent: int | None
    role: str
    content: str
    model: str
    created: float
    finish_reason: str
    settings: dict[str, Any]
    dropped: list[int]
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float | None
    seconds: float | None
    siblings: list[int] = []
    running: bool = False


class Summary(Struct, kw_only=True):
    """A conversation in a list. Times in seconds since 1970."""

    id: int
    title: str
    created: float
    updated: float


class Conversation(Summary, kw_only=True):
    """A conversation and its messages: those of the branch that is shown, or in an export all of them."""

    system: str
    model: str
    leaf: int | None
    messages: list[StoredMessage] = []


def create(db: sqlite3.Connection, title: str = "", system: str = "", model: str = "") -> Conversation:
    """Add an empty conversation."""
    now = time.time()
    cursor = db.execute(
        "INSERT INTO conversations (title, system, model, created, updated) VALUES (?, ?, ?, ?, ?)",
        (title, system, model, now, now),
    )
    return read(db, cursor.lastrowid or 0)


def list_all(db: sqlite3.Connection, search: str = "") -> list[Summary]:
    """Return the conversations, the last changed first; search: part of a title or of a message."""
    query = "SELECT id, title, created, updated FROM conversations"
    if search:
        query += (
            " WHERE title LIKE :part ESCAPE '\\' OR id IN"
            " (SELECT conversation FROM messages WHERE content LIKE :part ESCAPE '\\')"
        )
    escaped = re.sub(r"([\\%_])", r"\\\1", search)
    rows = db.execute(
        f"{query} ORDER BY updated DESC, id DESC LIMIT :most", {"part": f"%{escaped}%", "most": _MOST_LISTED}
    )
    return [Summary(id=id, title=title, created=created, updated=updated) for id, title, created, updated in rows]


def read(db: sqlite3.Connection, conversation: int, running: int | None = None) -> Conversation:
    """Return a conversation with its branch. running: id of the message that is being written. Raises ApiError 404."""
    row = _row(db, conversation)
    return Conversation(**row, messages=branch(db, conversation, row["leaf"], running))


def branch(
    db: sqlite3.Connection, conversation: int, leaf: int | None, running: int | None = None
) -> list[StoredMessage]:
    """Return the messages from the first to this one. Raises ApiError 404 if it is not in the conversation."""
    parents = _parents(db, conversation)
    children: dict[int | None, list[int]] = {}
    for id, parent in parents.items():
        children.setdefault(parent, []).append(id)
    ids: list[int] = []
    while leaf is not None:
        if leaf not in parents:
            raise _no_message(leaf, conversation)
        ids.append(leaf)
        leaf = parents[leaf]
    messages = _messages(db, conversation, ids)
    for message in messages:
        message.siblings = children[message.parent]
        message.running = message.id == running
    return messages


def export(db: sqlite3.Connection, conversation: int) -> Conversation:
    """Return a conversation with all its messages, oldest first. Raises ApiError 404."""
    row = _row(db, conversation)
    parents = _parents(db, conversation)
    messages = _messages(db, conversation, parents)
    for message in messages:
        message.siblings = [id for id, parent in parents.items() if parent == message.parent]
    return Conversation(**row, messages=messages)


def update(
    db: sqlite3.Connection, conversation: int, title: str | None, system: str | None, model: str | None
) -> Conversation:
    """Change what is not None. Raises ApiError 404."""
    _row(db, conversation)
    for name, value in (("title", title), ("system", system), ("model", model)):
        if value is not None:
            db.execute(f"UPDATE conversations SET {name} = ? WHERE id = ?", (value, conversation))
    return read(db, conversation)


def delete(db: sqlite3.Connection, conversation: int) -> None:
    """Delete a conversation with all its messages. Raises ApiError 404."""
    _row(db, conversation)
    db.execute("DELETE FROM messages WHERE conversation = ?", (conversation,))
    db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))


def choose(db: sqlite3.Connection, conversation: int, message: int) -> Conversation:
    """Show the branch through this message that was added to last. Raises ApiError 404."""
    _row(db, conversation)
    parents = _parents(db, conversation)
    if message not in parents:
        raise _no_message(message, conversation)
    below = {message}
    for id, parent in parents.items():  # parents have smaller ids than their children
        if parent in below:
            below.add(id)
    db.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (max(below), conversation))
    return read(db, conversation)


def begin_answer(
    db: sqlite3.Connection,
    conversation: int,
    parent: int | None,
    content: str | None,
    *,
    model: str,
    settings: dict[str, Any],
    dropped: Sequence[int],
    prompt_tokens: int,
) -> int:
    """Add an empty answer below `parent`, or below a new message of the user, and return its id; it becomes the leaf.

    content: of the new message, which is added below `parent`; None: `parent` is the user's. Raises ApiError 404 if
    conversation or parent are gone.
    """
    row = _row(db, conversation)
    if parent is not None and parent not in _parents(db, conversation):
        raise _no_message(parent, conversation)
    if content is not None:
        parent = _insert(db, conversation, parent, "user", content=content)
        if not row["title"]:
            db.execute("UPDATE conversations SET title = ? WHERE id = ?", (_title(content), conversation))
    answer = _insert(
        db,
        conversation,
        parent,
        "assistant",
        model=model,
        finish_reason=PARTIAL,
        settings=msgspec.json.encode(settings).decode(),
        dropped=msgspec.json.encode(list(dropped)).decode(),
        prompt_tokens=prompt_tokens,
    )
    db.execute(
        "UPDATE conversations SET leaf = ?, model = ?, updated = ? WHERE id = ?",
        (answer, model, time.time(), conversation),
    )
    return answer


def resume_answer(db: sqlite3.Connection, conversation: int, message: int, dropped: Sequence[int]) -> None:
    """Mark an answer as being written again; it becomes the leaf. Raises ApiError 404."""
    if message not in _parents(db, conversation):
        raise _no_message(message, conversation)
    db.execute(
        "UPDATE messages SET finish_reason = ?, dropped = ? WHERE id = ?",
        (PARTIAL, msgspec.json.encode(list(dropped)).decode(), message),
    )
    db.execute("UPDATE conversations SET leaf = ?, updated = ? WHERE id = ?", (message, time.time(), conversation))


def append(db: sqlite3.Connection, message: int, content: str, tokens: int, logprobs: str) -> None:
    """Add the next part of an answer. logprobs: JSON of its tokens without brackets. Raises ApiError 404."""
    try:
        db.execute(
            "INSERT INTO pieces (message, content, tokens, logprobs) VALUES (?, ?, ?, ?)",
            (message, content, tokens, logprobs),
        )
    except sqlite3.IntegrityError as error:
        raise deleted() from error


def finish(
    db: sqlite3.Connection, message: int, reason: str, first_token_seconds: float | None, seconds: float
) -> StoredMessage | None:
    """End an answer: move its pieces into the message, and return it; None if it was deleted.

    seconds: of this request; those of an answer that was continued are added up.
    """
    row = db.execute("SELECT conversation, content, logprobs FROM messages WHERE id = ?", (message,)).fetchone()
    if row is None:
        return None
    conversation, content, logprobs = row
    pieces = db.execute(
        "SELECT content, tokens, logprobs FROM pieces WHERE message = ? ORDER BY id", (message,)
    ).fetchall()
    db.execute(
        "UPDATE messages SET content = ?, logprobs = ?, completion_tokens = completion_tokens + ?, finish_reason = ?,"
        " first_token_seconds = coalesce(first_token_seconds, ?), seconds = coalesce(seconds, 0) + ? WHERE id = ?",
        (
            content + "".join(piece[0] for piece in pieces),
            ",".join(part for part in (logprobs, *(piece[2] for piece in pieces)) if part),
            sum(piece[1] for piece in pieces),
            reason,
            first_token_seconds,
            seconds,
            message,
        ),
    )
    db.execute("DELETE FROM pieces WHERE message = ?", (message,))
    db.execute("UPDATE conversations SET updated = ? WHERE id = ?", (time.time(), conversation))
    return branch(db, conversation, message)[-1]


def deleted() -> ApiError:
    """Return the error of an answer whose conversation is gone."""
    return ApiError(404, "the conversation was deleted while it was answered", code="deleted")


def logprobs_of(db: sqlite3.Connection, conversation: int, message: int) -> bytes:
    """Return the JSON list of an answer's tokens. Raises ApiError 404."""
    row = db.execute(
        "SELECT logprobs FROM messages WHERE id = ? AND conversation = ?",
        (min(message, _LARGEST_ID), min(conversation, _LARGEST_ID)),
    ).fetchone()
    if row is None:
        raise _no_message(message, conversation)
    pieces = db.execute("SELECT logprobs FROM pieces WHERE message = ? ORDER BY id", (message,))
    return f"[{','.join(part for part in (row[0], *(piece[0] for piece in pieces)) if part)}]".encode()


def _row(db: sqlite3.Connection, conversation: int) -> dict[str, Any]:
    names = ("id", "title", "system", "model", "leaf", "created", "updated")
    row = db.execute(
        f"SELECT {', '.join(names)} FROM conversations WHERE id = ?", (min(conversation, _LARGEST_ID),)
    ).fetchone()
    if row is None:
        raise ApiError(
            404, f"there is no conversation {conversation}; it may have been deleted", code="conversation_not_found"
        )
    return dict(zip(names, row, strict=True))


def _no_message(message: int, conversation: int) -> ApiError:
    return ApiError(404, f"there is no message {message} in conversation {conversation}", code="message_not_found")


def _parents(db: sqlite3.Connection, conversation: int) -> dict[int, int | None]:
    rows = db.execute("SELECT id, parent FROM messages WHERE conversation = ? ORDER BY id", (conversation,))
    return dict(rows.fetchall())


def _messages(db: sqlite3.Connection, conversation: int, ids: Iterable[int]) -> list[StoredMessage]:
    """Return these messages of a conversation, oldest first, with the pieces of those that are not finished."""
    wanted = set(ids)
    names = (
        *("id", "parent", "role", "content", "model", "created", "finish_reason", "settings", "dropped"),
        *("prompt_tokens", "completion_tokens", "first_token_seconds", "seconds"),
    )
    rows = db.execute(f"SELECT {', '.join(names)} FROM messages WHERE conversation = ? ORDER BY id", (conversation,))
    messages = {}
    for row in rows:
        if row[0] in wanted:
            values = dict(zip(names, row, strict=True))
            for name in ("settings", "dropped"):
                values[name] = msgspec.json.decode(values[name])
            messages[values["id"]] = StoredMessage(**values)
    pieces = db.execute(
        "SELECT message, content, tokens FROM pieces WHERE message IN (SELECT id FROM messages WHERE conversation = ?)"
        " ORDER BY id",
        (conversation,),
    )
    for id, content, tokens in pieces:
        if id in messages:
            messages[id].content += content
            messages[id].completion_tokens += tokens
    return list(messages.values())


def _insert(
    db: sqlite3.Connection,
    conversation: int,
    parent: int | None,
    role: str,
    *,
    content: str = "",
    model: str = "",
    finish_reason: str = "stop",
    settings: str = "{}",
    dropped: str = "[]",
    prompt_tokens: int = 0,
) -> int:
    cursor = db.execute(
        "INSERT INTO messages (conversation, parent, role, content, model, created, finish_reason, settings, dropped,"
        " prompt_tokens, completion_tokens, logprobs) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, '')",
        (conversation, parent, role, content, model, time.time(), finish_reason, settings, dropped, prompt_tokens),
    )
    return cursor.lastrowid or 0


def _title(content: str) -> str:
    """Return the beginning of a message, cut at a word."""
    words = " ".join(content.split())
    if len(words) <= _TITLE_LENGTH:
        return words
    head = words[:_TITLE_LENGTH]
    return f"{head.rpartition(' ')[0] or head}…"


def markdown(title: str, system: str, messages: Iterable[tuple[str, str]]) -> str:
    """Return a conversation as Markdown. messages: (name of its author, content) of each."""
    parts = [f"# {title or 'Conversation'}"]
    if system:
        parts.append(f"## System\n\n{system}")
    parts += [f"## {author}\n\n{content.strip()}" for author, content in messages]
    return "\n\n".join(parts) + "\n"
