"""Text in: documents from files, folders, globs and addresses, or from the Python that is running.

A corpus can be iterated as often as needed and yields the same documents in the same order each time: one a text file, one
a line of JSON lines, one a row of a table, one a docstring. Files are read one after another, never all at once. What a file
holds is the subject of readers.py; how one gets here from elsewhere, of remote.py.
"""

from __future__ import annotations

import ast
import functools
import itertools
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob, has_magic  # Path.glob takes no absolute pattern
from pathlib import Path

import platformdirs

from onym.data import remote
from onym.data.readers import COMPRESSED, SUFFIXES, Document, LongDocument, is_known, read_file
from onym.data.remote import Progress, RemoteFile
from onym.data.tables import MARKERS, saved_dataset
from onym.errors import DataError

__all__ = ["Corpus", "Document", "LongDocument", "SourceFile", "python_documentation"]


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Args:
        name: its path or address, as it is shown and as the sources of its documents begin.
        size: bytes; 0 where a storage does not say.
        place: where it is read from.
    """

    name: str
    size: int
    place: Path | RemoteFile


@dataclass(frozen=True)
class Corpus:
    """The text to train on.

    Args:
        data: files, folders (searched for ``SUFFIXES`` and compressed text, hidden files left out), datasets that
            ``save_to_disk`` of Hugging Face's datasets wrote, globs, and addresses that fsspec reads (``s3://…``); empty for
            the documentation that every Python carries: the language reference and the standard library's docstrings.
        text_field: the field of a JSON line, or the column of a table, that holds the text.
        suffixes: further suffixes that a folder is searched for, of plain text files.
        cache_dir: where files from elsewhere are kept; None for this system's folder for caches.
        progress: called while such a file is fetched.
    """

    data: tuple[str, ...] = ()
    text_field: str = "text"
    suffixes: tuple[str, ...] = ()
    cache_dir: Path | None = None
    progress: Progress | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What to call a run on this corpus."""
        if not self.data:
            return "python-docs"
        # Of a pattern, the last part that is none: notes/**/*.md -> notes
        first = self.data[0]
        parts = remote.url_parts(first) if remote.is_remote(first) else Path(remote.local_path(first)).parts
        plain = Path(*itertools.takewhile(lambda part: not has_magic(part), parts)).resolve()
        return Path(plain.stem if plain.suffix in COMPRESSED else plain).stem or "data"

    @property
    def description(self) -> str:
        """What an error or a summary calls this corpus."""
        if not self.data:
            return "Python's own documentation"
        return ", ".join(f"'{path}'" for path in self.data[:3]) + (", …" if len(self.data) > 3 else "")

    def files(self) -> list[SourceFile]:
        """All files, each once, folders and globs in sorted order; none where the corpus is Python's own documentation.

        Raises:
            DataError: an entry leads nowhere, or to nothing that can be read.
        """
        suffixes = tuple(f".{suffix.removeprefix('.')}" for suffix in self.suffixes)
        found: dict[object, SourceFile] = {}  # by what is the same however it is spelled
        for entry in self.data:
            if remote.is_remote(entry):
                for file in remote.find(entry, lambda name: is_known(name, suffixes)):
                    found.setdefault(file.address, SourceFile(file.url, file.size, file))
            else:
                for path, status in _find_local(remote.local_path(entry), suffixes):
                    same = (status.st_dev, status.st_ino) if status and status.st_ino else path
                    found.setdefault(same, SourceFile(str(path), status.st_size if status else 0, path))
        return list(found.values())

    def read(self, file: SourceFile) -> Iterator[Document | LongDocument]:
        """The non-empty documents of one file, which is fetched before where it is elsewhere.

        Raises:
            DataError: the file cannot be fetched, or is not what its name says. Documents before the place where it is wrong
                were yielded by then. :meth:`LongDocument.blocks` raises it too.
            StorageError: a fetched file cannot be kept: that is not the file's fault.
        """
        if isinstance(file.place, RemoteFile):
            cache = self.cache_dir or Path(os.environ.get("ONYM_CACHE_DIR") or platformdirs.user_cache_dir("onym"))
            path = remote.fetch(file.place, cache / "downloads", self.progress)
        else:
            path = file.place
        yield from read_file(path, file.name, self.text_field)

    def documents(self) -> Iterator[Document | LongDocument]:
        """All non-empty documents, always in the same order.

        Raises:
            DataError: a path leads nowhere, or a file is not what its name says.
        """
        if not self.data:
            yield from python_documentation()
            return
        for file in self.files():
            yield from self.read(file)


_Found = list[tuple[Path, os.stat_result | None]]
"""Files, and what the system says of them; None where it cannot be asked, which reading will complain of."""


def _find_local(entry: str, suffixes: tuple[str, ...]) -> _Found:
    """The files that a path or a pattern names."""
    try:
        path = Path(entry).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, no such user, a zero byte
        raise DataError(f"The path '{entry}' given to --data cannot be followed: {error}.") from error
    if is_folder:
        if not (files := _search(path, suffixes)):
            kinds = ", ".join((*SUFFIXES, *suffixes))
            raise DataError(f"The folder '{entry}' holds no {kinds} files: name another, or the files.")
    elif exists:
        files = [(path, path.stat())]
    elif has_magic(entry):
        matches = sorted(Path(match) for match in glob(str(path), recursive=True))  # noqa: PTH207
        files = [(match, status) for match in matches if (status := _status(match)) and stat.S_ISREG(status.st_mode)]
        if not files:
            raise DataError(f"No file matches '{entry}': check the pattern and the folder you are in.")
    else:
        raise DataError(f"There is no file or folder '{entry}': check the path given to --data.")
    return files


def _search(folder: Path, suffixes: tuple[str, ...]) -> _Found:
    """A folder's files of known kinds, sorted; of a dataset in it, or that it is, those that the dataset consists of."""

    def cannot_look(error: OSError) -> None:
        raise DataError(f"The folder '{error.filename}' cannot be read: {error.strerror}.") from error

    found: _Found = []
    for place, folders, names in os.walk(folder, onerror=cannot_look):
        if MARKERS.intersection(names) and (dataset := saved_dataset(Path(place))) is not None:
            files: _Found = [(path, path.stat()) for path in dataset]
            if place == str(folder):
                return files
            found += files
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not is_known(name, suffixes):
                continue
            status = _status(path := Path(place, name))
            if status is None or stat.S_ISREG(status.st_mode):
                found.append((path, status))
    return sorted(found, key=lambda file: file[0])


def _status(path: Path) -> os.stat_result | None:
    """None of a link that leads nowhere."""
    try:
        return path.stat()
    except OSError:
        return None


@functools.cache
def python_documentation() -> tuple[Document, ...]:
    """The text that every Python carries: the language reference, then the standard library's docstrings.

    Read from the running interpreter, so nothing is shipped or downloaded: 2.1 million characters in 7,800 documents with
    Python 3.11. Another Python version has other text. Kept in memory, because finding it takes seconds.
    """
    from pydoc_data.topics import topics

    documents = [Document(f"pydoc:{topic}", text) for topic, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library)
        if left_out.isdisjoint(parts.parts):
            documents.extend(_docstrings(path, str(parts)))
    return tuple(documents)


def _docstrings(path: Path, source: str) -> Iterator[Document]:
    try:
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # a file of somebody's, among the library's
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield Document(f"{source}:{getattr(node, 'name', '')}", text)
        # Definitions stand in statements only: not descending into expressions halves the time.
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        pending.extend(reversed(children))
