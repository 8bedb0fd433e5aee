"""What a file is that is no weight file, recognised by its first bytes, with what to do."""

from __future__ import annotations

from pathlib import Path

from onym.errors import CheckpointError, NoWeightsError

_READ = 4096
_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the file itself: git lfs pull fetches it"),
    (0, b"\x1f\x8b", "is a gzip archive: unpack it, and give the weight file in it"),
    (0, b"BZh", "is a bzip2 archive: unpack it, and give the weight file in it"),
    (0, b"\xfd7zXZ", "is an xz archive: unpack it, and give the weight file in it"),
    (0, b"7z\xbc\xaf", "is a 7z archive: unpack it, and give the weight file in it"),
    (0, b"\x28\xb5\x2f\xfd", "is a zstd archive: unpack it, and give the weight file in it"),
    (257, b"ustar", "is a tar archive: unpack it, and give the weight file or folder in it"),
    (0, b"GGUF", "is a GGUF file, which is not read here: give the file that it was made from"),
    (
        0,
        b"\x89HDF\r\n",
        "is an HDF5 file, which Keras writes and which is not read here: save the weights with torch or safetensors",
    ),
    (0, b"\x93NUMPY", "is a NumPy array, not a model: save named tensors with torch.save or safetensors"),
)
_MAGIC = b"\x80\x02\x8a\nl\xfc"  # of torch.save before 1.6
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error")


def known_kind(path: Path) -> CheckpointError | None:
    """The error that says what a file is, where its first bytes tell; None where they do not."""
    with path.open("rb") as file:
        start = file.read(_READ)
    if not start:
        return CheckpointError(
            f"'{path}' is empty: a save or a download was cut short. Fetch it again, or take an earlier one."
        )
    if not any(start):
        return CheckpointError(
            f"'{path}' begins with {len(start):,} zero bytes: a machine went down before the content reached its disk. Fetch "
            "it again, or take an earlier one."
        )
    if start[:4] == b"PK\x03\x04":
        return CheckpointError(
            f"'{path}' is cut short: it begins as a file of torch.save, and the list at its end is missing. Copy or "
            "download it again, or take an earlier one."
        )
    if start.lstrip().lower().startswith(_PAGES):
        return NoWeightsError(
            f"'{path}' is a web page or an error in XML, not the file itself: the download needs another address (of the raw "
            "file), or a login."
        )
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and not start.startswith(_MAGIC):
        return NoWeightsError(
            f"'{path}' is a plain pickle, not written by torch.save: load it with the program that it is of, and save the "
            "tensors in it with torch.save."
        )
    for at, first, sentence in _KINDS:
        if start[at : at + len(first)] == first:
            return NoWeightsError(f"'{path}' {sentence}.")
    return None
