"""Checkpoints on remote storage: fsspec's memory, and an S3 of our own on this machine that fails where it is told to."""

from __future__ import annotations

import gc
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import torch
from torch import Tensor, nn

import onym
from onym import Checkpointer
from onym.checkpoint.steps import pins, steps
from onym.errors import CheckpointError, ConfigError, OnymError, StorageError
from onym.format.manifest import MANIFEST, MODEL, OPTIMIZER
from onym.storage.paths import as_path

fsspec = pytest.importorskip("fsspec")
s3fs = pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto.server")
pytest.importorskip("upath")

BLOCK = 5 << 20  # the smallest part of an upload in parts that S3 takes


@dataclass
class Faults:
    """Between the client and the S3: counts what is asked, and refuses what it is told to."""

    app: Any
    refused: Callable[[str, str], bool] = lambda kind, key: False
    status: str = "403 Forbidden"
    shorten: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind, key = _kind(environ), environ["PATH_INFO"]
        with self.lock:
            self.asked.append((kind, key))
            refuse = self.refused(kind, key)
        if refuse:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            text = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no such luck</Message></Error>"
            start_response(self.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [b"" if kind == "head" else text]
        if not (self.shorten and kind == "get"):
            content = self.app(environ, start_response)
            if kind == "get":
                content = [b"".join(content)]
                self.sent += len(content[0])
            return content  # type: ignore[no-any-return]
        told: list[Any] = []
        content = b"".join(self.app(environ, lambda *arguments: told.extend(arguments)))
        content = content[: len(content) * 2 // 3]
        headers = [pair for pair in told[1] if pair[0].lower() not in ("content-length", "content-range", "etag")]
        start_response(told[0], [*headers, ("Content-Length", str(len(content)))])
        return [content]

    def fail(self, *kinds: str, number: int | None = None, key: str = "") -> None:
        """Refuse these kinds of request: all, or the one of this number (from 0)."""
        seen = 0

        def refused(kind: str, path: str) -> bool:
            nonlocal seen
            if kind not in kinds or key not in path:
                return False
            seen += 1
            return number is None or seen - 1 == number

        self.refused = refused

    def heal(self) -> None:
        self.refused, self.shorten, self.status = lambda kind, key: False, False, "403 Forbidden"

    def count(self, *kinds: str) -> int:
        return sum(kind in kinds for kind, _ in self.asked)


def _kind(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if method == "PUT":
        return "part" if "partNumber" in query else "copy" if "HTTP_X_AMZ_COPY_SOURCE" in environ else "put"
    if method == "POST":
        return "begin" if "uploads" in query else "complete" if "uploadId" in query else "delete"
    if method == "DELETE":
        return "abort" if "uploadId" in query else "delete"
    return "list" if "list-type" in query else "head" if method == "HEAD" else "get"


WRITES = ("put", "begin", "part", "complete")  # without autocommit s3fs uploads everything in parts
PROVE = os.environ.get("ONYM_PROVE") == "1"


@dataclass
class Storage:
    """Some remote place, and how to reach behind its back."""

    url: str
    faults: Faults
    client: Any
    bucket: str

    def keys(self, prefix: str = "") -> list[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        return [entry["Key"] for entry in listed]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def copy(self, old: str, new: str) -> None:
        for key in self.keys(old):
            self.write(key.replace(old, new), self.read(key))

    def delete(self, prefix: str) -> None:
        for key in self.keys(prefix):
            self.client.delete_object(Bucket=self.bucket, Key=key)

    def unfinished(self) -> list[str]:
        """Uploads in parts that were begun and neither completed nor aborted: they cost their owner money."""
        gc.collect()  # fsspec's files close themselves when they are forgotten, and closing writes
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Faults, str]]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class ReportedElsewhere(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *arguments: Any) -> None:
            pass

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    serving = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=ReportedElsewhere)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield faults, f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def _this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        assert host in ("127.0.0.1", "::1", "localhost", "local"), f"traffic to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module")
def reached(server: tuple[Faults, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of the S3; s3fs finds it too."""
    endpoint, nothing = server[1], str(tmp_path_factory.mktemp("none") / "none")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": nothing,
            "AWS_SHARED_CREDENTIALS_FILE": nothing,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_ENDPOINT_URL": endpoint,
        }.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint, "default_block_size": BLOCK})
        s3fs.S3FileSystem.clear_instance_cache()
        yield boto3.client("s3", endpoint_url=endpoint)
        gc.collect()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(server: tuple[Faults, str], reached: Any) -> Iterator[Storage]:
    faults, bucket = server[0], f"bucket-{uuid.uuid4().hex[:8]}"
    faults.heal()
    reached.create_bucket(Bucket=bucket)
    faults.asked.clear()
    yield Storage(f"s3://{bucket}", faults, reached, bucket)
    faults.heal()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A place on each kind of storage."""
    if request.param == "s3":
        yield str(request.getfixturevalue("s3").url)
        return
    yield "memory://onym-test"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


class Step(nn.Module):
    """A model of which every number is its step's, so that a mixture of two shows."""

    def __init__(self, step: int = 0, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width, width), float(step)))
        self.bias = nn.Parameter(torch.full((width,), float(step)))


def training(step: int, width: int = 8) -> dict[str, Any]:
    model = Step(step, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + step, momentum=0.5)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": torch.full_like(parameter, float(step))}
    return {"model": model, "optimizer": optimizer, "extra": {"step": step}}


def values_of(tensors: Iterable[Tensor]) -> set[float]:
    return {float(value) for tensor in tensors for value in tensor.detach().unique()}


def step_of(live: dict[str, Any]) -> int:
    """The one step that all parts are of."""
    found = values_of(live["model"].parameters())
    found |= values_of(state["momentum_buffer"] for state in live["optimizer"].state.values())
    found |= {live["optimizer"].param_groups[0]["lr"] - 1, float(live["extra"]["step"])}
    assert len(found) == 1, f"a mixture of {found}"
    return int(found.pop())


def restored(url: str, step: int | str = "latest", *, verify: bool = True) -> int | None:
    """The step that comes back, whole, and with nothing that had to be passed over."""
    live = training(0)
    report = Checkpointer(url).restore(live, step, verify=verify)
    assert report.skipped == [], report
    assert report.step in (None, step_of(live))
    return report.step


def save(url: str, *numbers: int, width: int = 8, **options: Any) -> Checkpointer:
    with Checkpointer(url, **{"keep_last": 9, **options}) as checkpointer:
        for number in numbers:
            checkpointer.save(number, training(number, width))
    return checkpointer


# --- what works on this machine works there ---------------------------------------------------------------------------------


def test_a_run_is_kept_and_found(url: str) -> None:
    run = f"{url}/some/run"
    assert restored(run) is None
    checkpointer = save(run, 1, 2, 3, 4, keep_last=2)
    assert checkpointer.steps == [3, 4]
    assert checkpointer.notes == []
    assert restored(run) == 4
    assert restored(run, verify=False) == 4
    assert restored(run, 3) == 3
    assert not checkpointer.progress or checkpointer.progress.done
    with pytest.raises(CheckpointError, match="no step 1; it has 3, 4"):
        restored(run, 1)
    live = training(0)
    again = Checkpointer(run)
    again.restore(live)
    again.save(5, training(5))
    again.close()
    opened = onym.open_checkpoint(run)
    assert opened.manifest is not None
    assert opened.manifest.provenance["parent"]["step"] == 4
    opened.verify()


def test_what_is_pinned_or_best_is_kept(url: str) -> None:
    run = f"{url}/run"
    with Checkpointer(run, keep_last=1, keep_best="loss", keep_every=4) as checkpointer:
        for number, loss in enumerate([9.0, 1.0, 5.0, 6.0, 7.0, 8.0], start=1):
            checkpointer.save(number, training(number), {"loss": loss})
            if number == 3:
                checkpointer.pin(3, "good")
    assert checkpointer.steps == [2, 3, 4, 6]
    assert pins(as_path(run)) == {"good": 3}
    assert restored(run, "good") == 3
    assert values_of(onym.open_checkpoint(run, step="good").model.state().values()) == {3.0}
    with pytest.raises(ConfigError, match="no step 1 to pin"):
        checkpointer.pin(1, "x")
    checkpointer.unpin("good")
    with pytest.raises(ConfigError, match="Nothing is pinned as 'good'"):
        checkpointer.unpin("good")
    save(run, 7, keep_last=1)
    assert steps(as_path(run)) == [7]


def test_an_earlier_step_puts_the_later_ones_aside(url: str) -> None:
    run = f"{url}/run"
    save(run, 1, 2, 3)
    save(run, 2)
    assert steps(as_path(run)) == [1, 2]
    assert restored(run) == 2
    names = [entry.name for entry in as_path(run).iterdir()]
    assert any(name.startswith("aside-1-step-000000003") for name in names), f"not lost: {names}"
    save(run, 3, 4)
    assert steps(as_path(run)) == [1, 2, 3, 4]
    assert restored(run) == 4


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_a_model_is_kept_and_found(url: str, name: str) -> None:
    path = f"{url}/models/{name}"
    model = onym.GPT(onym.GPTConfig(vocab_size=5, context_length=4, emb_dim=8, n_heads=2, n_layers=1, tie_embeddings=True))
    right = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        onym.save(model, path)
        found = onym.load_model(path).state_dict()
        assert found.keys() == right.keys()
        assert all(torch.equal(found[key], value) for key, value in right.items())
    into = onym.GPT(model.config)
    onym.load(path, into=into)
    opened = onym.open_checkpoint(path)
    assert opened.names
    for key in opened.names:
        assert torch.equal(opened.tensor(key), right[key])
        assert torch.equal(opened.part(key, 0), right[key][0])
    opened.verify()
    with pytest.raises(CheckpointError, match="no tensor 'zzz'"):
        opened.tensor("zzz")


def test_the_same_bytes_as_on_this_machine(url: str, tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pth"):
        onym.save(Step(3), tmp_path / name)
        onym.save(Step(3), f"{url}/{name}")
        there: Any = as_path(f"{url}/{name}")
        if name == "x.safetensors":
            (tmp_path / "copy.safetensors").write_bytes(there.read_bytes())
            assert values_of(onym.open_checkpoint(tmp_path / "copy.safetensors").model.state().values()) == {3.0}
            identities = {onym.open_checkpoint(path).identity for path in (tmp_path / name, f"{url}/{name}")}
            assert len(identities) == 1
        else:
            assert len(there.read_bytes()) == (tmp_path / name).stat().st_size
            with pytest.raises(CheckpointError, match="copy it here"):
                onym.load(f"{url}/{name}", into=Step())


def test_nothing_there_is_told(url: str) -> None:
    for path in (f"{url}/absent", f"{url}/absent.safetensors", f"{url}/absent.pth"):
        with pytest.raises(CheckpointError):
            onym.load(path, into=Step())
        with pytest.raises(CheckpointError):
            onym.open_checkpoint(path, step=3)
        with pytest.raises(CheckpointError):
            onym.load_model(path)
    assert restored(f"{url}/absent") is None
    assert steps(as_path(f"{url}/absent")) == []


def test_tensors_of_every_kind_come_back(url: str) -> None:
    tied = torch.randn(3, 4)
    model = nn.Module()
    tensors = {
        "nothing": torch.empty(0, 3),
        "one": torch.tensor(1.5, dtype=torch.float64),
        "halves": torch.randn(7).half(),
        "flags": torch.tensor([True, False]),
        "complexes": torch.randn(3, dtype=torch.complex128),
        "tied": tied,
        "tied_too": tied,
        "bytes": torch.arange(3, dtype=torch.uint8),
        "last": torch.randn(5),
    }
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    for path in (f"{url}/x.safetensors", f"{url}/x"):
        onym.save(model, path)
        found = onym.open_checkpoint(path).model.state()
        assert found.keys() == tensors.keys()
        assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in tensors.items())
        assert found["tied"].data_ptr() == found["tied_too"].data_ptr()
        found["last"].zero_()  # memory of one's own
        assert torch.equal(onym.open_checkpoint(path).tensor("last"), tensors["last"])


def test_names_that_cannot_be_reached_are_told() -> None:
    for path in ("nosuchstorage://x/y", "://x", "s3:/x"):
        with pytest.raises(OnymError):
            onym.open_checkpoint(path)


# --- damage there -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [MODEL, "trainer.json", MANIFEST, *([OPTIMIZER, "trainer.safetensors"] if PROVE else [])])
def test_damage_is_passed_over(s3: Storage, file: str) -> None:
    run = f"{s3.url}/run"
    save(run, 1, 2)
    key = f"run/step-000000002/{file}"
    whole = s3.read(key)
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    for content in (flipped, whole[:-3], whole + b"x", b"", None) if PROVE else (flipped, whole[:-3], None):
        s3.delete(key) if content is None else s3.write(key, content)
        live = training(0)
        report = Checkpointer(run).restore(live)
        assert report.step == step_of(live) == 1
        assert [path.name for path, _ in report.skipped] == ([] if (file, content) == (MANIFEST, None) else ["step-000000002"])


def test_a_step_without_a_manifest_is_none(s3: Storage) -> None:
    run = f"{s3.url}/run"
    save(run, 1)
    s3.copy("run/step-000000001", "run/step-000000007")
    s3.delete(f"run/step-000000007/{MANIFEST}")
    assert Checkpointer(run).steps == [1]
    assert restored(run) == 1
    with pytest.raises(CheckpointError, match="no step 7"):
        restored(run, 7)
    with pytest.raises(CheckpointError):
        onym.open_checkpoint(f"{run}/step-000000007")
    save(run, 7)
    assert restored(run) == 7


def test_an_answer_that_is_too_short_is_never_taken(s3: Storage) -> None:
    run, single = f"{s3.url}/run", f"{s3.url}/x.safetensors"
    save(run, 1)
    onym.save(Step(1), single)
    for path in (f"{run}/step-000000001", single):
        for opened_before in (True, False):
            opened = onym.open_checkpoint(path)
            if opened_before:
                _ = opened.names
            s3.faults.shorten = True
            for verify in (True, False):
                try:
                    opened = opened if opened_before else onym.open_checkpoint(path)
                    assert values_of(opened.model.state(verify=verify).values()) == {1.0}
                except OnymError:
                    continue
            s3.faults.heal()
    assert values_of(onym.open_checkpoint(single).model.state().values()) == {1.0}


# --- somebody else writes there too -----------------------------------------------------------------------------------------


def test_what_others_write_and_delete_is_seen(s3: Storage) -> None:
    """A client keeps what it listed; another process's steps must be seen all the same."""
    run = f"{s3.url}/run"
    save(run, 1)
    reader = Checkpointer(run)
    assert reader.steps == [1]
    assert restored(run) == 1
    save(f"{s3.url}/elsewhere", 2)
    s3.copy("elsewhere/step-000000002", "run/step-000000002")
    assert reader.steps == [1, 2]
    assert restored(run) == 2
    s3.delete("run/step-000000001")
    assert reader.steps == [2]
    assert restored(run) == 2
    assert values_of(onym.open_checkpoint(run).model.state().values()) == {2.0}
    s3.delete("run/")
    assert reader.steps == []
    assert restored(run) is None
    save(f"{s3.url}/elsewhere", 3)
    s3.copy("elsewhere/step-000000003", "run/step-000000003")
    assert restored(run) == 3


def test_what_is_written_over_is_not_mixed(s3: Storage) -> None:
    for name in ("x.safetensors", "x"):
        path = f"{s3.url}/{name}"
        onym.save(Step(1), path)
        opened = onym.open_checkpoint(path)
        assert values_of([opened.tensor("weight")]) == {1.0}
        onym.save(Step(2), path)
        for each in ("weight", "bias", "weight"):
            try:
                assert values_of([opened.tensor(each)]) == {1.0}
            except CheckpointError:
                continue
        assert values_of(onym.open_checkpoint(path).model.state().values()) == {2.0}


def test_what_is_deleted_under_a_reader_is_told(s3: Storage) -> None:
    for name in ("x.safetensors", "x"):
        onym.save(Step(1), f"{s3.url}/{name}")
        touched, untouched = onym.open_checkpoint(f"{s3.url}/{name}"), onym.open_checkpoint(f"{s3.url}/{name}")
        touched.tensor("bias")
        s3.delete(name)
        for opened in (touched, untouched):
            with pytest.raises(CheckpointError):
                opened.tensor("weight")
            with pytest.raises(CheckpointError):
                opened.verify()
            with pytest.raises(CheckpointError):
                opened.model.state()


# --- it fails ---------------------------------------------------------------------------------------------------------------


def settled_after_failure(s3: Storage, run: str, number: int = 2) -> None:
    """A save failed: the step before stands, nothing else counts, and the next save works."""
    s3.faults.heal()
    assert steps(as_path(run)) == [1]
    assert restored(run) == 1
    save(run, number)
    assert steps(as_path(run)) == [1, number]
    assert restored(run) == number


@pytest.mark.parametrize(
    ("kind", "number", "background"),
    [(kind, number, background) for kind in WRITES[1:] for number in range(5) for background in (True, False)]
    if PROVE
    else [("complete", 0, True), ("complete", 2, False), ("complete", 4, True), ("part", 1, False)],
)
def test_an_upload_that_fails(s3: Storage, kind: str, number: int, background: bool) -> None:
    """Each of the five files of a step, at each of the three stages of its upload."""
    run = f"{s3.url}/run"
    save(run, 1)
    s3.faults.fail(kind, number=number)
    checkpointer = Checkpointer(run, background=background)
    with pytest.raises(StorageError, match="Could not write at 's3://"):
        checkpointer.save(2, training(2))
        checkpointer.wait()
    checkpointer.wait()  # told once
    assert s3.keys("run/step-000000002") == [], "nothing is left of it"
    checkpointer.save(3, training(3))
    checkpointer.close()
    assert steps(as_path(run)) == [1, 3]
    settled = Checkpointer(run)
    live = training(0)
    assert settled.restore(live).step == step_of(live) == 3


def test_it_fails_in_as_many_places_as_there_are(s3: Storage) -> None:
    save(f"{s3.url}/run", 1)
    s3.faults.asked.clear()
    save(f"{s3.url}/run", 2)
    assert [s3.faults.count(kind) for kind in WRITES] == [0, 5, 5, 5]
    assert [key for kind, key in s3.faults.asked if kind == "complete"][-1].endswith(MANIFEST), "it comes last"


@pytest.mark.parametrize(("kind", "number"), [("begin", 1), ("part", 1), ("complete", 1)])
def test_an_upload_in_parts_that_fails(s3: Storage, kind: str, number: int) -> None:
    run, width = f"{s3.url}/run", 1700  # 11.6 MB: three parts for the model, three for the optimizer
    save(run, 1)
    s3.faults.asked.clear()
    s3.faults.fail(kind, number=number)
    with pytest.raises(StorageError, match="Could not write at 's3://"), Checkpointer(run) as checkpointer:
        checkpointer.save(2, training(2, width))
    assert s3.faults.count("begin") >= 1
    s3.faults.heal()
    assert s3.unfinished() == [], "begun and left"
    assert s3.keys("run/step-000000002") == []
    assert steps(as_path(run)) == [1]
    assert restored(run) == 1


def test_an_upload_in_parts(s3: Storage) -> None:
    run, width = f"{s3.url}/run", 1700
    save(run, 1, width=width)
    assert s3.faults.count("begin") == 5
    assert s3.faults.count("part") >= 9
    live = training(0, width)
    assert Checkpointer(run).restore(live).step == 1
    assert step_of(live) == 1
    before = s3.faults.sent
    opened = onym.open_checkpoint(run)
    first = s3.faults.sent - before
    assert values_of([opened.tensor("bias")]) == {1.0}
    assert s3.faults.sent - before - first < 100_000, "one small tensor, not the whole"
    onym.save(Step(2, width), f"{s3.url}/x.safetensors")
    before = s3.faults.sent
    assert values_of([onym.open_checkpoint(f"{s3.url}/x.safetensors").tensor("bias")]) == {2.0}
    assert s3.faults.sent - before < 100_000
    assert s3.unfinished() == []


@pytest.mark.parametrize("number", range(5) if PROVE else [0, 4])
def test_even_the_cleaning_up_fails(s3: Storage, number: int) -> None:
    """What is left of the upload has no manifest, so it is nothing; the next save writes over it."""
    run = f"{s3.url}/run"
    save(run, 1)
    seen = 0

    def refused(kind: str, key: str) -> bool:
        nonlocal seen
        seen += kind == "complete"
        return kind in ("delete", "abort") or (kind == "complete" and seen > number)

    s3.faults.refused = refused
    with pytest.raises(StorageError, match="Could not write"), Checkpointer(run) as checkpointer:
        checkpointer.save(2, training(2))
    settled_after_failure(s3, run)


def test_a_deletion_that_fails_is_noted_and_tried_again(s3: Storage) -> None:
    run = f"{s3.url}/run"
    with Checkpointer(run, keep_last=1) as checkpointer:
        checkpointer.save(1, training(1))
        checkpointer.wait()
        s3.faults.fail("delete")
        checkpointer.save(2, training(2))
        checkpointer.wait()
        assert any("could not be deleted" in note for note in checkpointer.notes)
        assert restored(run) == 2
        s3.faults.heal()
        checkpointer.save(3, training(3))
    assert checkpointer.steps == [3]
    assert restored(run) == 3
    assert {key.split("/")[1] for key in s3.keys("run/")} == {"step-000000003"}


@pytest.mark.parametrize("kinds", [("list",), ("get",), ("head",), ("list", "get", "head")], ids="+".join)
def test_a_storage_that_does_not_answer_is_no_empty_run(s3: Storage, kinds: tuple[str, ...]) -> None:
    """A training that took it for one would begin from the start, and leave all that it had."""
    run = f"{s3.url}/run"
    save(run, 1, 2)
    fsspec.filesystem("s3").invalidate_cache()
    s3.faults.fail(*kinds)
    live = training(0)
    try:
        report = Checkpointer(run).restore(live)
    except OnymError:
        assert step_of(live) == 0, "nothing was changed"
    else:
        assert report.step == 2, "not an earlier one, and not none"
        assert step_of(live) == 2
    s3.faults.heal()
    assert restored(run) == 2


@pytest.mark.parametrize("status", ["500 Internal Server Error", "404 Not Found"])
def test_other_answers_are_told_too(s3: Storage, status: str) -> None:
    run = f"{s3.url}/run"
    save(run, 1)
    s3.faults.fail("part", key="model")
    s3.faults.status = status
    with pytest.raises(StorageError, match="Could not write"), Checkpointer(run) as checkpointer:
        checkpointer.save(2, training(2))
    settled_after_failure(s3, run)


def test_a_bucket_that_is_not_there_is_told(s3: Storage) -> None:
    nowhere = "s3://bucket-that-is-not-there"
    for path in (f"{nowhere}/x.safetensors", f"{nowhere}/x.pth", f"{nowhere}/x"):
        with pytest.raises(StorageError):
            onym.save(Step(1), path)
    with pytest.raises(StorageError):
        Checkpointer(f"{nowhere}/run", background=False).save(1, training(1))
    with pytest.raises(OnymError):
        onym.open_checkpoint(f"{nowhere}/x")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_that_fails_leaves_the_one_before(s3: Storage, name: str) -> None:
    path = f"{s3.url}/{name}"
    for width in (8, 1700):
        onym.save(Step(1, width), path)
        before = s3.read(name)
        for kind in WRITES[1:] if PROVE else ("complete",):
            s3.faults.fail(kind)
            with pytest.raises(StorageError, match="Could not write"):
                onym.save(Step(2, width), path)
            s3.faults.heal()
            assert s3.read(name) == before
            assert s3.unfinished() == []
    onym.save(Step(3), path)
    assert s3.read(name) != before


@pytest.mark.parametrize("number", range(2))
def test_a_folder_that_fails_is_the_one_before_or_none(s3: Storage, number: int) -> None:
    """There is no renaming there, so a folder that is replaced does not count until it is whole again."""
    path = f"{s3.url}/x"
    onym.save(Step(1), path)
    s3.faults.fail("complete", number=number)
    with pytest.raises(StorageError, match="Could not write"):
        onym.save(Step(2), path)
    s3.faults.heal()
    try:
        found = onym.open_checkpoint(path).model.state()
    except CheckpointError:
        pass
    else:
        assert values_of(found.values()) == {1.0}
    onym.save(Step(3), path)
    assert values_of(onym.open_checkpoint(path).model.state().values()) == {3.0}


def test_an_interrupted_block_publishes_nothing(url: str) -> None:
    """Not a storage's error but one of ours, in the middle of a file."""
    from onym.storage.paths import storage_of

    class Interrupted(BaseException):
        pass

    path = as_path(f"{url}/x.bin")
    with pytest.raises(Interrupted), storage_of(path).new_file(path) as file:
        file.write(b"half")
        raise Interrupted
    assert url.startswith("memory:") or not path.exists(), "fsspec's memory shows a file from when it is opened"
    folder = as_path(f"{url}/folder")
    with pytest.raises(Interrupted), storage_of(folder).new_folder(folder, "last") as new:
        new.create("one").write(b"half")
        new.create("last").write(b"whole")
        raise Interrupted
    assert not (folder / "last").exists()
    assert not (folder / "one").exists()
