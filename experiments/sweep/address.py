"""Convert between addresses of a sweep's storage: as given by the user, as stored in `sweep.json`, and as opened.

The user's path is relative to the working directory, like every path on the command line. `sweep.json` stores a path
inside the sweep's folder relative to that folder, and any other path absolute, so that it is valid in every working
directory.
"""

import os
import re
from pathlib import Path

from model.errors import InputError

_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(.*)")


def file_of(url: str) -> Path | None:
    """Return the file of a `journal:FILE` or `sqlite:///FILE` address; None if a server is addressed."""
    if url.startswith("journal:"):
        return Path(url.removeprefix("journal:"))
    found = _SQLITE.fullmatch(url)
    return Path(found[2]) if found else None


def with_file(url: str, file: Path) -> str:
    """Return the address with another file."""
    prefix = "journal:" if url.startswith("journal:") else url[: url.index(":///") + 4]
    return f"{prefix}{file}"


def check_given(url: str) -> None:
    """Raise InputError for a storage that no second process could open."""
    if url.startswith("sqlite") and (file_of(url) in (None, Path(), Path(":memory:")) or "?" in url or "/file:" in url):
        raise InputError(
            f"the storage {url!r} is not a file that workers can share; give sqlite:///FILE, without options, or leave "
            "--storage out for a file in the sweep's folder"
        )
    if url == "journal:":
        raise InputError("the storage 'journal:' names no file; give journal:FILE")


def kept(url: str, folder: Path) -> str:
    """Return the address as stored in `sweep.json`, from the one that the user gave in the working directory."""
    file = file_of(url)
    if file is None:
        return url
    whole = Path(os.path.abspath(file.expanduser()))
    if whole.resolve().is_relative_to(folder.resolve()):
        return with_file(url, whole.resolve().relative_to(folder.resolve()))
    return with_file(url, whole)


def opened(url: str, folder: Path) -> str:
    """Return the address to open, from the one stored in the folder's `sweep.json`."""
    file = file_of(url)
    return url if file is None else with_file(url, folder.absolute() / file)


def opened_by_older(url: str, folder: Path) -> str:
    """Return the address to open for a `sweep.json` of an older version, which stored relative paths as given.

    They were relative to the working directory, usually a parent of the sweep's folder: the first of these folders that
    has the file is taken, or else the working directory.
    """
    file = file_of(url)
    if file is None:
        return url
    places = (Path.cwd(), folder.resolve(), *folder.resolve().parents)
    existing = [place / file for place in places if (place / file).exists()]
    return with_file(url, existing[0] if existing else Path.cwd() / file)


def shown(url: str) -> str:
    """Return the address without its password."""
    if file_of(url) is not None:
        return url
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def without_password(url: str) -> str:
    """Return a PostgreSQL URL without its password, which is moved to PGPASSWORD, where libpq finds it.

    Workers started by this process inherit it; others need PGPASSWORD or a ~/.pgpass.
    """
    if not url.startswith("postgresql"):
        return url
    from sqlalchemy.engine import URL, make_url

    whole = make_url(url)
    if whole.password is None:
        return url
    os.environ["PGPASSWORD"] = str(whole.password)
    bare = URL.create(whole.drivername, whole.username, None, whole.host, whole.port, whole.database, whole.query)
    return bare.render_as_string()
