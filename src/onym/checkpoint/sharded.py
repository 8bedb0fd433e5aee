"""A folder that several processes fill behind the back of their training: each writes its share, the first makes a whole of it.

The first one makes the folder under a temporary name and tells the others where; each writes, flushes and reports; then the
first writes the manifest and renames it. Where one of them fails or dies nothing is put in place, and all know why.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from onym.checkpoint.coordinator import StoreCoordinator
from onym.errors import CheckpointError, OnymError, StorageError, storage_error
from onym.format.manifest import MANIFEST, Manifest
from onym.format.reader import Checkpoint, read_checkpoint
from onym.format.sharded_tensor import Pieces, ShardedTensor, assemble, tabled
from onym.format.writer import Content, Progress, Share, complete_folder, write_share
from onym.storage.local import NewFolder, new_folder

_CHECK = "read it back"


class ShardedSave:
    """One process's hold on it.

    Args:
        path: where it shall be.
        place, token: as the first process has them of :meth:`made`.
        number, count: this process among those that fill it.
        store: of torch.distributed, that they met by.
    """

    def __init__(self, path: Path, place: str, token: str, number: int, count: int, store: Any) -> None:
        self.path, self.place, self.token = path, place, token
        self._number, self._count = number, count
        self._agreement = StoreCoordinator(store, token, number, count, f"'{path}'")
        self._making = ExitStack()
        self._folder = NewFolder(Path(place))

    @classmethod
    def made(cls, path: Path, nbytes: int, count: int, store: Any) -> ShardedSave:
        """The first process's, which makes it.

        Raises:
            StorageError: the disk refused, or has no room for that many bytes.
        """
        making = ExitStack()
        folder = making.enter_context(new_folder(path, MANIFEST, nbytes))
        assert isinstance(folder, NewFolder)
        shared = cls(path, str(folder.path), secrets.token_hex(8), 0, count, store)
        shared._making, shared._folder = making, folder
        return shared

    @property
    def seen(self) -> bool:
        """Whether this process sees it: it is on a disk that they share."""
        return Path(self.place).is_dir()

    def give_up(self) -> None:
        """Delete what there is of it; the first process does it."""
        with suppress(OnymError):
            self._making.__exit__(StorageError, StorageError("A save was given up."), None)

    def help(self, content: Content, progress: Progress) -> None:
        """Write this process's share, and return when all is in place: any process's but the first.

        Raises:
            StorageError: nothing was put in place; says why.
        """
        with self._agreement.alive():
            try:
                self._write(content, progress)
                if self._agreement.decision() == _CHECK:
                    self._agreement.report("checked", self._damage())
                    self._agreement.decision("ended")
            finally:
                self._agreement.leave()

    def lead(
        self,
        keep: Callable[[Callable[[Path], Manifest], Callable[[Path], None]], None],
        content: Content,
        texts: Mapping[str, str],
        progress: Progress,
        **about: Any,
    ) -> None:
        """Write the first process's share, wait for the others', and put all in place.

        Args:
            keep: called with what writes the folder, and with what reads it back.
            texts, about: as in :func:`onym.format.writer.complete_folder`.

        Raises:
            StorageError: nothing was put in place; says why.
        """

        def write(path: Path) -> Manifest:
            self._write(content, progress)
            shares: list[Share] = self._agreement.reports("written")
            files = {name: entry for share in shares for name, entry in share.files.items()}
            if len({share.table for share in shares}) > 1:
                raise CheckpointError(
                    "The processes do not keep the same tensors: save has to be called with the same objects in all of them."
                )
            together: dict[str, dict[str, ShardedTensor]] = {file: {} for file in content.tensors}
            together |= tabled(content.table, [share.parts for share in shares])
            for file, entries in assemble(written for share in shares for written in share.written).items():
                together[file] = together.get(file, {}) | entries
            pieces = Pieces(together)
            manifest = complete_folder(self._folder, path, files, pieces, texts, **about)
            self._making.close()
            return manifest

        def read_back(path: Path) -> None:
            self._agreement.decide(_CHECK)
            self._agreement.report("checked", self._damage())
            for reason in self._agreement.reports("checked"):
                if reason is not None:
                    raise CheckpointError(reason)

        with self._agreement.alive():
            failure: BaseException | None = None
            try:
                keep(write, read_back)
            except BaseException as error:
                failure = error
                raise
            finally:
                with suppress(OnymError):  # who does not hear it finds out: it is as it is
                    self._agreement.decide(failure=failure)
                    self._agreement.decide(failure=failure, stage="ended")
                self._agreement.leave()
                self.give_up()

    def _write(self, content: Content, progress: Progress) -> None:
        def written(count: int) -> None:
            if self._agreement.given_up:
                raise StorageError(f"'{self.path}' was given up.")
            progress(count)

        try:
            share = write_share(self._folder, self._number, content, written)
        except OSError as error:
            self._agreement.report("written", failure=storage_error("write", self.path, error))
        except Exception as error:
            self._agreement.report("written", failure=error)
        else:
            self._agreement.report("written", share)
        finally:
            if self._number:
                self._folder.close()

    def _damage(self) -> str | None:
        """What is wrong with what the next process has written, read from the disk; the first one looks at the rest too."""
        try:
            checkpoint = read_checkpoint(self.path)
            damage = next(checkpoint.damages(self._to_check(checkpoint)), None)
        except Exception as error:
            return str(error)
        return None if damage is None else damage.reason

    def _to_check(self, checkpoint: Checkpoint) -> list[str]:
        assert checkpoint.manifest is not None
        assert checkpoint.pieces is not None
        written = checkpoint.pieces.files
        ending = f"-{(self._number + 1) % self._count:05d}.safetensors"
        rest = [file for file in checkpoint.manifest.files if file not in written] if self._number == 0 else []
        return [file for file in written if file.endswith(ending)] + rest
