"""A checkpoint that several ranks write in the background: each writes its own files, and rank 0 commits the folder.

Rank 0 makes the folder under a temporary name and broadcasts it; each rank writes, fsyncs and reports; then rank 0 writes the
manifest and renames the folder. If a rank fails or dies nothing is committed, and all ranks raise the reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from onym.checkpoint.coordinator import StoreCoordinator, rendezvous_store
from onym.errors import CheckpointError, ConfigError, OnymError, StorageError, storage_error
from onym.format.chunk_index import ChunkIndex, ShardedTensor
from onym.format.manifest import MANIFEST, Manifest
from onym.format.rank_files import RankContent, RankReport, assemble, complete_folder, write_rank_files
from onym.format.reader import read_checkpoint
from onym.format.tensor_writing import Progress
from onym.format.writer import About
from onym.state.collectives import all_gather_object, broadcast_from_rank0, get_rank, get_world_size
from onym.storage.local import LocalFolder, new_folder

_VERIFY = "verify"


class ShardedSave:
    """One rank's side of one save.

    Args:
        path: the place of the checkpoint.
        temporary, token: as rank 0 has them of :meth:`create`.
        rank, world_size: of this process.
        store: the rendezvous store of torch.distributed.
    """

    def __init__(self, path: Path, temporary: str, token: str, rank: int, world_size: int, store: Any) -> None:
        self.path, self.temporary, self.token = path, temporary, token
        self._rank, self._world_size = rank, world_size
        self._coordinator = StoreCoordinator(store, token, rank, world_size, f"'{path}'")
        self._commit = ExitStack()
        self._folder = LocalFolder(Path(temporary))

    @classmethod
    def create(cls, path: Path, nbytes: int, world_size: int, store: Any) -> ShardedSave:
        """Make the folder, in rank 0.

        Raises:
            StorageError: the disk refused, or has no room for that many bytes.
        """
        commit = ExitStack()
        folder = commit.enter_context(new_folder(path, MANIFEST, nbytes))
        save = cls(path, str(folder.path), secrets.token_hex(8), 0, world_size, store)
        save._commit, save._folder = commit, folder
        return save

    @classmethod
    def begin(cls, path: Path, nbytes: int, acquire: Callable[[], None]) -> ShardedSave | None:
        """Make the folder, and open it on all ranks, which all call this; None where they do not see the same disk.

        Args:
            path: the place of the checkpoint.
            nbytes: that this rank writes.
            acquire: takes the right to write there, in rank 0.

        Raises:
            ConfigError: the ranks are at different steps.
            StorageError: the disk refused, or has no room for all.
        """
        plans = all_gather_object((path.name, nbytes))
        if len({name for name, _ in plans}) > 1:
            raise ConfigError(f"The ranks are at different steps ({', '.join(name for name, _ in plans[:4])}).")
        store = rendezvous_store()
        created: list[ShardedSave] = []

        def create() -> tuple[str, str]:
            acquire()
            created.append(cls.create(path, sum(nbytes for _, nbytes in plans), get_world_size(), store))
            return created[0].temporary, created[0].token

        place = broadcast_from_rank0(create)
        save = created[0] if created else cls(path, *place, get_rank(), get_world_size(), store)
        if all(all_gather_object(save.seen)):
            return save
        save.discard()
        return None

    @property
    def seen(self) -> bool:
        """Whether this rank sees the folder: it is on a disk that the ranks share."""
        return Path(self.temporary).is_dir()

    def discard(self) -> None:
        """Delete the temporary folder, in rank 0, if it was not committed."""
        with suppress(OnymError):
            self._commit.__exit__(StorageError, StorageError("The save was given up."), None)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """In rank 0, around :meth:`write` and :meth:`verify`: at the end all ranks know how the save ended."""
        failure: BaseException | None = None
        with self._coordinator.alive():
            try:
                yield
            except BaseException as error:
                failure = error
                raise
            finally:
                with suppress(OnymError):  # a rank that does not receive it finds out by the checkpoint
                    self._coordinator.decide(failure=failure)
                    self._coordinator.decide(failure=failure, stage="ended")
                self._coordinator.leave()
                self.discard()

    def write(self, content: RankContent, texts: Mapping[str, str], about: About, progress: Progress) -> Manifest:
        """Write the files of rank 0, wait for those of the others, and commit. In rank 0.

        Raises:
            StorageError: nothing was committed; says why.
            CheckpointError: the ranks do not save the same tensors.
        """
        self._write_own(content, progress)
        reports: list[RankReport] = self._coordinator.reports("written")
        if len({report.table for report in reports}) > 1:
            raise CheckpointError(
                "The ranks do not save the same tensors: save has to be called with the same objects in all of them."
            )
        tensors: dict[str, dict[str, ShardedTensor]] = {file: {} for file in content.tensors}
        tensors |= content.table.assemble(report.chunks for report in reports)
        for file, entries in assemble(chunk for report in reports for chunk in report.written).items():
            tensors[file] = tensors.get(file, {}) | entries
        manifest = complete_folder(self._folder, self.path, reports, ChunkIndex(tensors), texts, about)
        self._commit.close()
        return manifest

    def verify(self) -> None:
        """Read the checkpoint back, each rank a part. In rank 0.

        Raises:
            CheckpointError: it is damaged, for any rank.
        """
        self._coordinator.decide(_VERIFY)
        self._coordinator.report("checked", self._damage())
        for reason in self._coordinator.reports("checked"):
            if reason is not None:
                raise CheckpointError(reason)

    def follow(self, content: RankContent, progress: Progress) -> None:
        """Write the files of this rank, and return when rank 0 has committed. In any rank but rank 0.

        Raises:
            StorageError: nothing was committed; says why.
        """
        with self._coordinator.alive():
            try:
                self._write_own(content, progress)
                if self._coordinator.decision() == _VERIFY:
                    self._coordinator.report("checked", self._damage())
                    self._coordinator.decision("ended")
            finally:
                self._coordinator.leave()

    def _write_own(self, content: RankContent, progress: Progress) -> None:
        """Write the files of this rank, and report how that ended."""

        def written(count: int) -> None:
            if self._coordinator.given_up:
                raise StorageError(f"'{self.path}' was given up.")
            progress(count)

        try:
            report = write_rank_files(self._folder, self._rank, content, written)
        except Exception as error:
            failure = storage_error("write", self.path, error) if isinstance(error, OSError) else error
            self._coordinator.report("written", failure=failure)
        else:
            self._coordinator.report("written", report)
        finally:
            if self._rank:
                self._folder.close()

    def _damage(self) -> str | None:
        """What is wrong with the files of the next rank, read from the disk. Rank 0 verifies those that no rank wrote too."""
        try:
            checkpoint = read_checkpoint(self.path)
            assert checkpoint.manifest is not None
            assert checkpoint.chunk_index is not None
            shards = checkpoint.chunk_index.files
            ending = f"-{(self._rank + 1) % self._world_size:05d}.safetensors"
            wanted = [file for file in shards if file.endswith(ending)]
            if self._rank == 0:
                wanted += [file for file in checkpoint.manifest.files if file not in shards]
            damage = next(checkpoint.damages(wanted), None)
        except Exception as error:
            return str(error)
        return None if damage is None else damage.reason
