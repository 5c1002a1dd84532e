"""The page's files: complete, all from this server, third-party ones as they were released."""

import hashlib
import json
import re

import pytest

from infer.serve.assets import FOLDER
from infer.serve.security import POLICY

VENDOR = FOLDER / "vendor"
OWN = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.parent != VENDOR)


def test_page_and_files_are_served_with_the_policy(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == (FOLDER / "index.html").read_text()
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in POLICY
    for path in FOLDER.rglob("*"):
        if path.is_file():
            response = client.get(f"/page/{path.relative_to(FOLDER).as_posix()}")
            assert response.content == path.read_bytes()
            assert response.headers["cache-control"] == "no-cache"
            if path.suffix in (".js", ".mjs"):
                assert "javascript" in response.headers["content-type"]
            again = client.get(response.request.url.path, headers={"if-none-match": response.headers["etag"]})
            assert again.status_code == 304
    for path in ("/page/none.js", "/page/../run.py", "/page/%2e%2e/run.py", "/page/"):
        assert client.get(path).status_code == 404, path


def test_what_files_import_exists():
    for path in OWN:
        if path.suffix == ".js":
            for name in re.findall(r'from "(\./[^"]+)"', path.read_text()):
                assert (FOLDER / name).is_file(), (path.name, name)
    html = (FOLDER / "index.html").read_text()
    for name in re.findall(r'(?:href|src)="([^"]+)"', html):
        assert (FOLDER.parent / name).is_file(), name


def test_nothing_is_inline_and_nothing_is_fetched_from_elsewhere():
    html = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", html)
    for path in OWN:
        found = re.findall(r"https?://[^\s\"'`)]+", path.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, path.name
        assert "innerHTML" not in path.read_text()


@pytest.mark.parametrize(
    "entry", json.loads((VENDOR / "manifest.json").read_text()), ids=lambda entry: entry["package"]
)
def test_third_party_files_are_unchanged(entry):
    assert hashlib.sha256((VENDOR / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert len((VENDOR / entry["license_file"]).read_text()) > 1000
    assert {"package", "version", "license", "source"} < entry.keys()


def test_every_third_party_file_is_in_the_manifest():
    entries = json.loads((VENDOR / "manifest.json").read_text())
    known = {name for entry in entries for name in (entry["file"], entry["license_file"])}
    assert {path.name for path in VENDOR.iterdir()} == known | {"manifest.json"}
