"""Text from elsewhere: a web server of our own that breaks as it is told to, fsspec's memory, an S3 of our own."""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from onym.data import remote
from onym.data.corpus import Corpus, SourceFile
from onym.errors import DataError, StorageError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

TEXT = "".join(f"line {number} of a text that is fetched\n" for number in range(400))


class Web(ThreadingHTTPServer):
    """Serves ``files``; what it does wrong is set by each test."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.has_ranges = True
        self.statuses: list[int] = []
        """What the next requests are refused with."""
        self.breaks: list[int] = []
        """After how many bytes the connection is closed in the next answers."""
        self.shortened = False
        """Whether answers are complete, but shorter than HEAD says."""
        self.asked: list[tuple[str, str, str]] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str = "GET") -> int:
        return sum(each[0] == method for each in self.asked)


class _Answer(BaseHTTPRequestHandler):
    server: Web

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        web, wanted = self.server, self.headers.get("Range", "")
        web.asked.append((self.command, self.path, wanted))
        if web.statuses:
            return self.send_error(web.statuses.pop(0))
        if (body := web.files.get(self.path.partition("?")[0])) is None:
            return self.send_error(404)
        first, end, size = 0, len(body), len(body)
        if web.has_ranges and (found := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)):
            first, end = int(found[1]), min(int(found[2]) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        else:
            self.send_response(200)
        body = body[first:end]
        if web.shortened and self.command == "GET":
            body = body[: max(size * 2 // 3 - first, 0)]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(web.files[self.path.partition("?")[0]])}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        if web.breaks:
            body = body[: web.breaks.pop(0)]
        web.sent += len(body)
        self.wfile.write(body)
        return None


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    server.files["/book.txt"] = TEXT.encode()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited before each retry, had it been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    return seconds


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def texts(cache: Path, *data: str, **options: Any) -> list[str]:
    return [document.text for document in Corpus(data, cache_dir=cache, **options).documents()]  # type: ignore[union-attr]


def downloads(cache: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (cache / "downloads").iterdir())


def test_a_web_file_is_fetched_once_and_whole(tmp_path: Path, web: Web) -> None:
    seen: list[tuple[str, int, int]] = []
    corpus = Corpus((f"{web.url}/book.txt",), cache_dir=tmp_path, progress=lambda *told: seen.append(told))
    (file,) = corpus.files()
    assert (file.name, file.size) == (f"{web.url}/book.txt", len(TEXT))
    assert web.count() == 0, "nothing is fetched to know what there is"
    (document,) = corpus.read(file)
    assert document == (file.name, TEXT)
    assert seen[-1] == ("Fetching book.txt", len(TEXT), len(TEXT))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
    fetched = web.count()
    assert list(corpus.read(file)) == [document]
    assert list(corpus.documents()) == [document]
    assert web.count() == fetched
    assert web.sent == len(TEXT)
    assert downloads(tmp_path) == ["book.txt"]


def test_what_a_file_is_shows_before_the_query_of_its_address(tmp_path: Path, web: Web) -> None:
    web.files["/rows.jsonl.gz"] = gzip.compress(b'{"text": "a"}\n{"text": "b"}\n')
    corpus = Corpus((f"{web.url}/rows.jsonl.gz?download=true",), cache_dir=tmp_path)
    assert [tuple(document) for document in corpus.documents()] == [  # type: ignore[arg-type]
        (f"{web.url}/rows.jsonl.gz?download=true:1", "a"),
        (f"{web.url}/rows.jsonl.gz?download=true:2", "b"),
    ]


def test_a_file_that_changed_there_is_fetched_anew(tmp_path: Path, web: Web) -> None:
    assert texts(tmp_path, f"{web.url}/book.txt") == [TEXT]
    web.files["/book.txt"] = b"X" * len(TEXT)
    assert texts(tmp_path, f"{web.url}/book.txt") == ["X" * len(TEXT)]


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path: Path, web: Web, waits: list[float]) -> None:
    web.breaks = [2000, 2000, 500, 0, 0, 2000, 0, 10]  # of the answers that follow
    assert texts(tmp_path, f"{web.url}/book.txt") == [TEXT]
    assert waits, "there were retries"
    assert web.sent < len(TEXT) + 20_000, "only what was lost in the middle of an answer is sent again"
    assert downloads(tmp_path) == ["book.txt"]


def test_a_server_without_ranges_begins_again(tmp_path: Path, web: Web) -> None:
    web.has_ranges = False
    web.breaks = [5000, 7000, 9000]
    assert texts(tmp_path, f"{web.url}/book.txt") == [TEXT]
    assert downloads(tmp_path) == ["book.txt"]


def test_a_later_run_fetches_the_rest(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRIES", 0)
    read = remote._Download._blocks

    def cut(self: Any, start: int) -> Iterator[bytes]:
        for number, block in enumerate(read(self, start)):
            if number == 5:
                raise KeyboardInterrupt
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(remote._Download, "_blocks", cut)
        with pytest.raises(KeyboardInterrupt):
            texts(tmp_path, f"{web.url}/book.txt")
    assert downloads(tmp_path) == ["book.txt.part"]
    web.asked.clear()
    assert texts(tmp_path, f"{web.url}/book.txt") == [TEXT]
    (first, *_) = [wanted for method, _, wanted in web.asked if method == "GET"]
    assert first.startswith("bytes=5000-")
    assert downloads(tmp_path) == ["book.txt"]


@pytest.mark.parametrize("has_ranges", [True, False])
def test_one_that_always_breaks_is_given_up_and_the_others_are_kept(
    tmp_path: Path, web: Web, waits: list[float], has_ranges: bool
) -> None:
    web.files["/good.txt"] = b"good"
    web.has_ranges = has_ranges
    corpus = Corpus((f"{web.url}/good.txt", f"{web.url}/book.txt"), cache_dir=tmp_path)
    good, bad = corpus.files()
    assert len(list(corpus.read(good))) == 1
    web.breaks = [0] * 1000
    message = (
        rf"'{web.url}/book\.txt' could not be read, tried 5 times: .*Files fetched so far are kept in '{tmp_path}/downloads'"
    )
    with pytest.raises(DataError, match=message) as caught:
        list(corpus.read(bad))
    assert "\n" not in str(caught.value)
    assert waits == [1, 2, 4, 8]
    assert "good.txt" in downloads(tmp_path)
    assert "book.txt" not in downloads(tmp_path)
    web.breaks = []
    assert len(list(corpus.read(bad))) == 1


def test_a_file_that_ends_too_soon_is_not_taken(tmp_path: Path, web: Web) -> None:
    web.shortened = True
    with pytest.raises(DataError, match=r"book\.txt' could not be read, tried 5 times"):
        texts(tmp_path, f"{web.url}/book.txt")
    assert "book.txt" not in downloads(tmp_path)


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, web: Web, waits: list[float]) -> None:
    corpus = Corpus((f"{web.url}/book.txt",), cache_dir=tmp_path)
    (file,) = corpus.files()
    web.statuses = [503, 429, 500]
    assert len(list(corpus.read(file))) == 1
    assert waits
    web.statuses = [503, 503, 429, 429]  # HEAD, and GET in its place
    assert corpus.files() == [file]


@pytest.mark.parametrize(
    ("status", "message"), [(404, "There is no file"), (403, "may not be read from here"), (401, "creden")]
)
def test_what_will_not_change_is_not_tried_again(
    tmp_path: Path, web: Web, waits: list[float], status: int, message: str
) -> None:
    corpus = Corpus((f"{web.url}/book.txt",), cache_dir=tmp_path)
    (file,) = corpus.files()
    web.statuses = [status] * 100
    with pytest.raises(DataError, match=message):
        corpus.files()
    with pytest.raises(DataError, match=message):
        list(corpus.read(file))
    assert waits == []


def test_a_server_that_is_not_there_is_said(tmp_path: Path, waits: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=rf"'http://127\.0\.0\.1:{port}/x\.txt' could not be read, tried 5 times: .*onnect"):
        texts(tmp_path, f"http://127.0.0.1:{port}/x.txt")
    assert waits == [1, 2, 4, 8]
    with pytest.raises(DataError, match=rf"'ftp://127\.0\.0\.1:{port}/x\.txt' could not be read, tried 5 times: .*efused"):
        texts(tmp_path, f"ftp://127.0.0.1:{port}/x.txt")  # this one connects before it is asked for anything


def test_folders_and_patterns_of_a_storage(tmp_path: Path, memory: Any) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.md", "sub/d.rst", ".hidden/e.txt", "weights.bin"):
        content = json.dumps({"text": f"text of {name}"}) if name.endswith("jsonl") else f"text of {name}"
        memory.pipe(f"/notes/{name}", content.encode())
    assert texts(tmp_path, "memory://notes") == ["text of a.jsonl", "text of b.txt", "text of sub/c.md"]
    assert texts(tmp_path, "memory://notes", suffixes=("rst",))[-1] == "text of sub/d.rst"
    assert texts(tmp_path, "memory://notes/*.txt") == ["text of b.txt"]
    assert texts(tmp_path, "memory://notes/**/*.[mr]*") == ["text of sub/c.md", "text of sub/d.rst"]
    assert texts(tmp_path, "memory://notes/b.txt", "memory://notes/*.txt") == ["text of b.txt"], "each once"
    sources = [document.source for document in Corpus(("memory://notes",), cache_dir=tmp_path).documents()]
    assert sources == ["memory:///notes/a.jsonl:1", "memory:///notes/b.txt", "memory:///notes/sub/c.md"]
    memory.pipe("/tokens/train.bin", bytes(10))
    for url, message in (
        ("memory://notes/gone.txt", "There is no file or folder 'memory://notes/gone.txt'"),
        ("memory://notes/*.gz", r"No file matches 'memory://notes/\*\.gz'"),
        ("memory://tokens", "The folder 'memory://tokens' holds no files of a kind that is read"),
    ):
        with pytest.raises(DataError, match=message):
            texts(tmp_path, url)


def test_a_web_folder_is_read_by_its_links(tmp_path: Path, web: Web) -> None:
    web.files["/notes/"] = b'<a href="b.txt">b</a> <a href="a.md">a</a> <a href="image.png">no</a> <a href="../book.txt">up</a>'
    web.files.update({"/notes/a.md": b"of a", "/notes/b.txt": b"of b", "/notes/image.png": b"\x89"})
    corpus = Corpus((f"{web.url}/notes/",), cache_dir=tmp_path)
    assert [(file.name, file.size) for file in corpus.files()] == [
        (f"{web.url}/notes/a.md", 4),
        (f"{web.url}/notes/b.txt", 4),
    ]
    assert texts(tmp_path, f"{web.url}/notes/") == ["of a", "of b"]
    assert texts(tmp_path, f"{web.url}/notes/*.txt") == ["of b"]


class NoRanges(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A storage whose files are read from the beginning alone, and that fails in the middle."""

    protocol = "noranges"
    cachable = False
    failures = 0

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": len(TEXT)}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        system = self

        class Stream:
            at = 0

            def __enter__(self) -> Stream:
                return self

            def __exit__(self, *error: object) -> None:
                pass

            def seek(self, place: int) -> None:
                raise ValueError("Cannot seek")

            def read(self, count: int) -> bytes:
                if self.at > 5000 and system.failures:
                    type(system).failures -= 1
                    raise TimeoutError
                block = TEXT.encode()[self.at : self.at + count]
                self.at += count
                return block

        return Stream()


def test_a_storage_that_cannot_seek_begins_again(tmp_path: Path, waits: list[float]) -> None:
    fsspec.register_implementation("noranges", NoRanges, clobber=True)
    NoRanges.failures = 3
    assert texts(tmp_path, "noranges://x/book.txt") == [TEXT]
    NoRanges.failures = 1000
    with pytest.raises(DataError, match=r"tried 5 times: TimeoutError\. Files fetched"):
        texts(tmp_path / "other", "noranges://x/book.txt")


def test_an_s3_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    s3fs, boto3 = pytest.importorskip("s3fs"), pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    monkeypatch.undo()  # the server's thread sleeps
    monkeypatch.setattr(remote, "FIRST_WAIT", 0)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="notes/a.jsonl.gz", Body=gzip.compress(b'{"text": "of a"}\n'))
        client.put_object(Bucket="bucket", Key="notes/sub/b.txt", Body=TEXT.encode())
        for url in ("s3://bucket/notes", "s3://bucket/notes/", "s3://bucket/notes/**", "s3://bucket"):
            assert texts(tmp_path, url) == ["of a", TEXT]
        names = [file.name for file in Corpus(("s3://bucket/notes",)).files()]
        assert names == ["s3://bucket/notes/a.jsonl.gz", "s3://bucket/notes/sub/b.txt"]
        for url in ("s3://bucket/gone.txt", "s3://no-such-bucket/x.txt"):
            with pytest.raises(DataError, match="There is no file"):
                texts(tmp_path, url)
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'nosuch://x/y\.txt' is on a storage that fsspec does not know: .*nosuch"):
        texts(tmp_path, "nosuch://x/y.txt")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(DataError, match=r"'gs://x/y\.txt' is remote, and a package .* is missing: .*gcsfs"):
            texts(tmp_path, "gs://x/y.txt")
        patch.setitem(sys.modules, "aiohttp", None)
        with pytest.raises(DataError, match=r"pip install 'onym\[remote\]'"):
            texts(tmp_path, "https://host/x.txt")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    for url, extra in (("https://host/x.txt", "remote"), ("s3://bucket/x.txt", "s3")):
        with pytest.raises(DataError, match=rf"'{url}' is remote: pip install 'onym\[{extra}\]'"):
            texts(tmp_path, url)


def test_a_cache_that_cannot_be_written_is_not_the_files_fault(tmp_path: Path, web: Web) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="Could not keep a fetched file"):
        texts(tmp_path / "cache", f"{web.url}/book.txt")


def test_several_that_need_a_file_fetch_it_once(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    corpus = Corpus((f"{web.url}/book.txt",), cache_dir=tmp_path)
    (file,) = corpus.files()
    found: list[object] = []

    def read(file: SourceFile = file) -> None:
        found.extend(corpus.read(file))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(file.name, TEXT)] * 4
    assert web.sent == len(TEXT)
    assert downloads(tmp_path) == ["book.txt"]
