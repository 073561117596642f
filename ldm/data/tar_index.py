"""Where the pictures lie in a tar shard, so that any of them can be read without reading what precedes it.

A shard holds samples as WebDataset names them: members ``000000012.jpg``, ``000000012.txt`` and
``000000012.json`` make the sample ``000000012``. Its index is built by one pass over the tar and is small
enough to keep: some 60 bytes a picture.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from ldm.data.picture_header import describe_damage, read_header
from ldm.data.sidecars import MAX_BYTES as MAX_TEXT_BYTES
from ldm.data.sidecars import is_sound

PICTURE_EXTENSIONS: Final = ("jpg", "jpeg", "png", "webp", "bmp", "jfif")
"""Extensions of members that are pictures, in lower case."""

MAX_PICTURE_BYTES: Final = 1 << 29
"""The longest picture file that is read, in bytes: it is held in memory while it is decoded."""

_READ_ERRORS: Final = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
"""What tarfile raises on headers that are damaged, or were made to do harm."""

_VERSION: Final = 2
_BLOCK: Final = 512
_TEXT: Final = 0
_JSON: Final = 1


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, by their place in the tar.

    Attributes:
        tar_bytes: size of the tar that was read.
        stamp: what else tells that the tar is still the same one: its time of change, or its ETag.
        names: bytes (N,), the pictures' names in UTF-8, in the order of the tar.
        pictures: int64 (N, 2), offset and length of each picture in bytes.
        texts: int64 (N, 3), offset and length of what holds the caption, and whether it is plain text (0) or
            JSON (1).
        sizes: int32 (N, 2), width and height of each upright picture in pixels.
        bad: by sample, why one cannot be trained on; these are not among the others.
        damage: why the tar cannot be read to its end; empty where it can.
        empty_captions: number of samples whose caption is empty.
    """

    tar_bytes: int
    stamp: str
    names: npt.NDArray[np.bytes_]
    pictures: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    bad: dict[str, str] = field(default_factory=dict)
    damage: str = ""
    empty_captions: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        """Give a picture's name in the tar."""
        return bytes(self.names[number]).decode("utf-8")


@dataclass
class _Sample:
    """The members of one sample that matter here: offset and length."""

    name: str = ""
    picture: tuple[int, int] | None = None
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None
    pictures: int = 0
    texts: int = 0
    jsons: int = 0


def build_index(path: str, stamp: str) -> ShardIndex:
    """Read a tar once, and note where its samples are.

    Args:
        path: the tar, uncompressed.
        stamp: kept in the index.

    Returns:
        The index. Samples that cannot be trained on (no caption, a picture whose header cannot be read, ...) are
        in its ``bad``; of a tar that is cut off, the samples before the cut are indexed.

    Raises:
        OSError: the file cannot be opened.
    """
    names: list[bytes] = []
    pictures: list[tuple[int, int]] = []
    texts: list[tuple[int, int, int]] = []
    sizes: list[tuple[int, int]] = []
    bad: dict[str, str] = {}
    empty = 0
    with open(path, "rb") as file:
        tar_bytes = os.fstat(file.fileno()).st_size
        samples, damage = _read_members(file, tar_bytes)
        for key, sample in samples.items():
            try:
                text = _text_place(sample)
                caption = read_caption(file, text)
                size = _picture_size(file, sample)
            except ValueError as error:
                bad[key] = str(error)
                continue
            assert sample.picture is not None
            names.append(sample.name.encode("utf-8"))
            pictures.append(sample.picture)
            texts.append(text)
            sizes.append(size)
            empty += not caption
    return ShardIndex(
        tar_bytes=tar_bytes,
        stamp=stamp,
        names=np.array(names, dtype=np.bytes_),
        pictures=np.array(pictures, dtype=np.int64).reshape(-1, 2),
        texts=np.array(texts, dtype=np.int64).reshape(-1, 3),
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        bad=bad,
        damage=damage,
        empty_captions=empty,
    )


def read_caption(file: IO[bytes], text: tuple[int, int, int] | npt.NDArray[np.int64]) -> str:
    """Read a sample's caption.

    Args:
        file: the opened tar.
        text: a row of ``ShardIndex.texts``.

    Returns:
        The caption on one line, without surrounding white space.

    Raises:
        ValueError: it is too long or no UTF-8 text, or the JSON holds none.
    """
    offset, length, kind = (int(number) for number in text)
    member = "txt" if kind == _TEXT else "json"
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"its .{member} is longer than {MAX_TEXT_BYTES:,} bytes")
    content = read_member(file, offset, length)
    try:
        caption: object = content.decode("utf-8-sig")
        if kind == _JSON:
            held = json.loads(str(caption))
            caption = held.get("caption") if isinstance(held, dict) else None
    except UnicodeDecodeError:
        raise ValueError(f"its .{member} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise ValueError("its .json cannot be read as JSON") from None
    if not isinstance(caption, str):
        raise ValueError("no caption (no .txt, and its .json holds none)")
    if not is_sound(caption):
        raise ValueError(f"its .{member} holds half a character (a lone surrogate) or a null")
    return " ".join(caption.split())


def read_member(file: IO[bytes], offset: int, length: int) -> bytes:
    """Read a stretch of an opened file; shorter than asked for where the file ends."""
    file.seek(offset)
    return file.read(length)


def _read_members(file: IO[bytes], tar_bytes: int) -> tuple[dict[str, _Sample], str]:
    """List the samples of a tar, and say why it cannot be read to its end, if so."""
    samples: dict[str, _Sample] = {}
    end = 0
    try:
        # Without ignore_zeros, members end at the first block of zeros, as they do for every other reader.
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.offset_data + member.size > tar_bytes:
                    return samples, f"is cut off within {member.name}, at byte {tar_bytes:,}"
                if member.isfile():
                    _take_member(samples, member)
    except _READ_ERRORS as error:
        if end == 0:
            return samples, "is no uncompressed tar file"
        return samples, f"is damaged after byte {end:,} ({' '.join(str(error).split()) or type(error).__name__})"
    # tarfile takes a header that it cannot read for the end.
    mark = read_member(file, end, _BLOCK)
    if len(mark) < _BLOCK:
        return samples, f"is cut off at byte {tar_bytes:,} (a tar ends with blocks of zeros)"
    if any(mark):
        return samples, f"is damaged after byte {end:,} (no member begins there)"
    return samples, ""


def _take_member(samples: dict[str, _Sample], member: tarfile.TarInfo) -> None:
    folder, slash, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    extension = extension.lower()
    if not stem or not dot or extension not in (*PICTURE_EXTENSIONS, "txt", "json"):
        return
    sample = samples.setdefault(_as_text(f"{folder}{slash}{stem}"), _Sample())
    place = (member.offset_data, member.size)
    if extension == "txt":
        sample.text = place
        sample.texts += 1
    elif extension == "json":
        sample.json = place
        sample.jsons += 1
    else:
        sample.name = _as_text(member.name)
        sample.picture = place
        sample.pictures += 1


def _as_text(name: str) -> str:
    """Make a name writable: what is no UTF-8 in it comes as lone surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _text_place(sample: _Sample) -> tuple[int, int, int]:
    if sample.picture is None:
        raise ValueError("a caption without a picture")
    if sample.pictures > 1:
        raise ValueError(f"{sample.pictures} pictures of one name")
    if sample.texts > 1:
        raise ValueError(f"{sample.texts} .txt files of one name")
    if sample.text is not None:
        return (*sample.text, _TEXT)
    if sample.jsons > 1:
        raise ValueError(f"{sample.jsons} .json files of one name")
    if sample.json is not None:
        return (*sample.json, _JSON)
    raise ValueError("no caption (neither .txt nor .json)")


def _picture_size(file: IO[bytes], sample: _Sample) -> tuple[int, int]:
    assert sample.picture is not None
    if sample.picture[1] > MAX_PICTURE_BYTES:
        raise ValueError(f"the picture is longer than {MAX_PICTURE_BYTES:,} bytes")
    try:
        # All of it: a PNG may tell at its end how it is to be turned, and the disk reads ahead anyway.
        header = read_header(io.BytesIO(read_member(file, *sample.picture)))
    except OSError as error:
        raise ValueError(describe_damage(error.__cause__ or error)) from None
    return header.width, header.height


def write_index(index: ShardIndex, path: str) -> None:
    """Write an index to a file, which appears whole or not at all.

    Args:
        index: what to write.
        path: the file.

    Raises:
        OSError: it cannot be written.
    """
    notes = {"bad": index.bad, "damage": index.damage, "empty_captions": index.empty_captions, "stamp": index.stamp}
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        np.savez(
            file,
            version=np.int64(_VERSION),
            tar_bytes=np.int64(index.tar_bytes),
            notes=np.frombuffer(json.dumps(notes).encode("utf-8"), dtype=np.uint8),
            names=index.names,
            pictures=index.pictures,
            texts=index.texts,
            sizes=index.sizes,
        )
    os.replace(part, path)


def read_index(path: str) -> ShardIndex | None:
    """Read an index file.

    Args:
        path: from :func:`write_index`.

    Returns:
        The index; None where there is none of this version, or a damaged one, so that it has to be built.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            if int(held["version"]) != _VERSION:
                return None
            notes = json.loads(held["notes"].tobytes())
            return ShardIndex(
                tar_bytes=int(held["tar_bytes"]),
                names=held["names"],
                pictures=held["pictures"],
                texts=held["texts"],
                sizes=held["sizes"],
                **notes,
            )
    except Exception:  # noqa: BLE001 - a damaged archive, or header of an array, leads anywhere; the tar is still there
        return None
