"""What a picture file says of itself before its pixels are decoded: its size, its format, how to turn it."""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import IO, Final, TypeAlias, TypeVar

from PIL import Image, ImageFile, JpegImagePlugin, features

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that are read, whatever a file's suffix; none of their readers runs a program or opens another file."""

MAX_PIXELS: Final = 178_956_970
"""Pixels of the largest picture that is read, in any format: Pillow's own limit against decompression bombs."""

MAX_DECODE_BYTES: Final = 1_500_000_000
"""Memory that decoding one picture may take, in bytes; see :func:`decode_bytes`."""

TURNED: Final = (5, 6, 7, 8)
"""The EXIF orientations that exchange width and height."""

DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on damaged files."""

PictureSource: TypeAlias = str | os.PathLike[str] | IO[bytes]
"""A file's path, or a seekable stream that holds a whole file (a PNG may tell its orientation at its end)."""

_TERSE: Final = ("decoder error", "could not create decoder object", "cannot load this image", "failed to read next")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_ORIENTATION_TAG: Final = 0x0112
_SAMPLES: Final = {0: 3.0, 1: 2.0, 2: 1.5}  # values a pixel, by Pillow's number of a JPEG's chroma sampling
_BITS_TAG: Final = 0x0102
_TILE_WIDTH_TAG: Final = 0x0142
_TILE_LENGTH_TAG: Final = 0x0143
_XMP_KEY: Final = "xmp"
_OUR_XMP_KEY: Final = "xmp set aside"
_XMP_ORIENTATION: Final = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_EXIF_INTEGERS: Final = {1: "B", 3: "H", 4: "L"}  # the types byte, short and long, as struct names them
_MODE_BITS: Final = {"1": 1, "I": 32, "F": 32}
_MOST_PAGES: Final = 1000
_PNG_SIGNATURE_BYTES: Final = 8
_PNG_MOST_CHUNKS: Final = 100_000
_PNG_LONGEST_NOTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """What a picture file says of itself.

    Attributes:
        width: of the upright picture in pixels, so after its EXIF orientation is applied.
        height: likewise.
        format: one of ``FORMATS``: the content's, the suffix may say otherwise.
        mode: Pillow's name of the pixels' kind, such as ``"RGB"``, ``"RGBA"``, ``"I;16"`` or ``"CMYK"``.
        orientation: the EXIF orientation, 1 to 8; 1 is upright.
        frames: pictures in the file: more than 1 in an animation or a file of pages, of which the first is
            trained on. Pages are counted up to 1,000.
        bits: bits a channel as stored; 8 in most pictures.
        transparent: whether parts of it may be transparent (which is laid on white).
        file_bytes: size of the file in bytes.
    """

    width: int
    height: int
    format: str
    mode: str
    orientation: int
    frames: int
    bits: int
    transparent: bool
    file_bytes: int


def read_header(source: PictureSource) -> PictureHeader:
    """Read what a picture file says of itself; no pixel is decoded.

    The size is the one that ``read_picture`` gives.

    Args:
        source: the file.

    Returns:
        The header.

    Raises:
        OSError: the file cannot be read, is no picture, or is one too large to decode; says which file and why.
    """
    try:
        file_bytes = _file_bytes(source)
        with open_picture(source) as image:
            orientation, png_bits = _read_notes(image, source)
            width, height = upright_size(image, orientation)
            return PictureHeader(
                width=width,
                height=height,
                format=_format_of(image),
                mode=image.mode,
                orientation=orientation,
                bits=png_bits or _bits(image),
                transparent=image.has_transparency_data,
                file_bytes=file_bytes,
                frames=_count_frames(image),
            )
    except DECODER_ERRORS as error:
        raise OSError(f"{source_name(source)}: {describe_damage(error)}") from error


def read_headers(
    paths: Sequence[str], threads: int | None = None, progress: Callable[[int], object] | None = None
) -> dict[str, PictureHeader | str]:
    """Read the headers of many picture files, several at a time.

    Args:
        paths: the files; one that is named twice is read once.
        threads: how many are read at a time; None: twice as many as there are processor cores, for a disk keeps
            some of them waiting.
        progress: called with 1 after each file, such as a progress bar's ``update``; in the calling thread.

    Returns:
        By path, in the order of ``paths``: the header, or the reason why it cannot be read.
    """
    distinct = list(dict.fromkeys(paths))
    found: dict[str, PictureHeader | str] = {}
    for path, result in map_in_threads(_header_or_reason, distinct, threads or min(32, 2 * (os.cpu_count() or 1))):
        found[path] = result
        if progress is not None:
            progress(1)
    return found


def _header_or_reason(path: str) -> PictureHeader | str:
    try:
        return read_header(path)
    except OSError as error:
        return describe_damage(error.__cause__ or error)


def map_in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], threads: int
) -> Iterator[tuple[_Item, _Result]]:
    """Apply a function to many items in threads, holding only a few results at a time.

    Args:
        function: what to apply.
        items: its arguments.
        threads: how many run at a time.

    Yields:
        Each item with its result, in the order of the items.
    """
    rest = iter(items)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[tuple[_Item, Future[_Result]]] = deque(
            (item, pool.submit(function, item)) for item in islice(rest, 8 * threads)
        )
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            for following in islice(rest, 1):
                waiting.append((following, pool.submit(function, following)))


@contextmanager
def open_picture(source: PictureSource) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file without decoding its pixels.

    Args:
        source: the file.

    Yields:
        The opened picture, as stored (not upright yet).

    Raises:
        OSError: it is no regular file, empty, or takes too much memory to decode.
        Exception: another of ``DECODER_ERRORS``, as Pillow's readers raise them.
    """
    _silence_pillow()
    if _file_bytes(source) == 0:
        raise OSError("not a picture: the file is empty")
    with _open_file(source) as file:
        image = Image.open(file, formats=_readable_formats())
        needed = decode_bytes(image)
        if needed > MAX_DECODE_BYTES:
            raise OSError(
                f"too large to decode safely: {image.width * image.height / 1e6:.0f} megapixels of "
                f"{_format_of(image)} take {needed / 1e9:.1f} GB of memory (the limit is "
                f"{MAX_DECODE_BYTES / 1e9:.1f} GB); make it smaller or save it as another format"
            )
        if image.format == "TIFF" and _XMP_KEY in image.info:
            # Some of Pillow's versions would also turn a TIFF by these notes; read_orientation heeds them instead.
            image.info[_OUR_XMP_KEY] = image.info.pop(_XMP_KEY)
        yield image


def read_orientation(image: ImageFile.ImageFile, source: PictureSource) -> int:
    """Find how an opened picture has to be turned; it must not be decoded yet.

    Args:
        image: from :func:`open_picture`.
        source: the file that it was opened from.

    Returns:
        The EXIF orientation, from the camera data or else from the XMP data; 1 where there is none.
    """
    return _read_notes(image, source)[0]


def upright_size(image: ImageFile.ImageFile, orientation: int) -> tuple[int, int]:
    """Tell the size that an opened picture has once it is upright.

    Args:
        image: from :func:`open_picture`, not decoded yet.
        orientation: from :func:`read_orientation`.

    Returns:
        Width and height in pixels.
    """
    return (image.height, image.width) if orientation in TURNED and not turns_itself(image) else image.size


def turns_itself(image: ImageFile.ImageFile) -> bool:
    """Tell whether Pillow's reader makes an opened picture upright (a TIFF by its tag) and tells its upright size.

    Args:
        image: from :func:`open_picture`, not decoded yet.
    """
    return image.format == "TIFF" and _tiff_orientation(image) is not None


def decode_bytes(image: ImageFile.ImageFile, scale: int = 1) -> int:
    """Estimate the memory that decoding a picture takes at its peak.

    Args:
        image: from :func:`open_picture`.
        scale: how many times smaller a JPEG is decoded: 1, 2, 4 or 8.

    Returns:
        Bytes.
    """
    pixels = image.width * image.height
    channels = len(image.getbands())
    if image.format == "WEBP" or image.format == "AVIF":
        return 16 * pixels  # the reader's two canvases, its output and Pillow's copy
    if image.format == "TIFF":
        # One strip may hold the whole picture, and one tile more than that.
        return 4 * pixels + channels * max(1, _bits(image) // 8) * max(pixels, _tile_pixels(image))
    if _format_of(image) == "JPEG":
        # A progressive JPEG's coefficients, of 2 bytes, are all held until its last scan.
        held = 2 * _SAMPLES.get(JpegImagePlugin.get_sampling(image), channels) if image.info.get("progressive") else 0
        return int(held * pixels) + 4 * pixels // scale**2
    return 4 * pixels


def count_scans(source: PictureSource) -> int:
    """Count the scans of a JPEG file, each of which passes over the whole picture.

    Args:
        source: the file.

    Returns:
        How many scans it has, or a few more (a thumbnail's may be counted).
    """
    found, last = 0, b""
    with _open_file(source) as file:
        while block := file.read(1 << 20):
            found += (last + block).count(b"\xff\xda")
            last = block[-1:]
    return found


def describe_damage(error: BaseException) -> str:
    """Say in a few words why a picture could not be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture, or a damaged one (nothing that reads as {', '.join(FORMATS[:-1])} or {FORMATS[-1]})"
    if isinstance(error, Image.DecompressionBombError):
        return f"a decompression bomb, or a picture of more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged ({text})" if text.startswith(_TERSE) or not isinstance(error, OSError) else text


def source_name(source: PictureSource) -> str:
    """Name a picture's source for a message."""
    return str(getattr(source, "name", "picture")) if not isinstance(source, str | os.PathLike) else os.fspath(source)


@contextmanager
def _open_file(source: PictureSource, buffering: int = -1) -> Iterator[IO[bytes]]:
    """Open a file, or rewind a stream and put it back to where it was."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb", buffering=buffering) as file:
            yield file
    else:
        position = source.tell()
        source.seek(0)
        yield source
        source.seek(position)


def _file_bytes(source: PictureSource) -> int:
    if not isinstance(source, str | os.PathLike):
        return source.seek(0, os.SEEK_END)
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise OSError("a folder, not a picture" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return status.st_size


@lru_cache(maxsize=1)
def _readable_formats() -> tuple[str, ...]:
    """List the formats that this Pillow was built with; it fails over the name of one that it lacks."""
    modules = {"WEBP": "webp", "AVIF": "avif"}
    return tuple(name for name in FORMATS if name not in modules or _pillow_has(modules[name]))


def _pillow_has(module: str) -> bool:
    return module in features.modules and bool(features.check_module(module))


def _silence_pillow() -> None:
    """Keep Pillow's remarks about damaged files off the console, from now on.

    They come without a path, and what matters of them is told by the check. The filter is for its modules alone
    and stays: adding and removing it around each picture would not be safe with several threads.
    """
    ours = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if ours not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    tiff_logger = logging.getLogger("PIL.TiffImagePlugin")
    if tiff_logger.level == logging.NOTSET:
        tiff_logger.setLevel(logging.CRITICAL)


def _format_of(image: ImageFile.ImageFile) -> str:
    # A JPEG with further pictures behind the first (telephones append depth maps) is an MPO to Pillow.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _bits(image: ImageFile.ImageFile) -> int:
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_TAG) if image.format == "TIFF" else None
    if isinstance(bits, tuple) and bits and all(isinstance(number, int) for number in bits):
        return max(bits)
    return 16 if image.mode.startswith("I;16") else _MODE_BITS.get(image.mode, 8)


def _tile_pixels(image: ImageFile.ImageFile) -> int:
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH_TAG), tags.get(_TILE_LENGTH_TAG)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _count_frames(image: ImageFile.ImageFile) -> int:
    if image.format == "MPO":
        return 1
    try:
        if image.format == "TIFF":
            return _count_pages(image)
        return max(1, int(getattr(image, "n_frames", 1)))
    except DECODER_ERRORS:
        return 1  # the first is sound, what follows it is not


def _count_pages(image: ImageFile.ImageFile) -> int:
    """Count a TIFF's pages up to a limit: Pillow looks each up among all before it, for hours where there are many."""
    for page in range(1, _MOST_PAGES):
        try:
            image.seek(page)
        except EOFError:
            return page
    return _MOST_PAGES


def _tiff_orientation(image: ImageFile.ImageFile) -> object:
    return getattr(image, "tag_v2", {}).get(_ORIENTATION_TAG)


def _read_notes(image: ImageFile.ImageFile, source: PictureSource) -> tuple[int, int | None]:
    """Read an opened picture's orientation, and a PNG's bits a channel.

    Pillow finds some of it only after decoding, and warns on the console about what it cannot make out.
    """
    exif, bits = image.info.get("exif"), None
    xmp = image.info.get(_OUR_XMP_KEY, image.info.get(_XMP_KEY))
    if image.format == "PNG":
        with _open_file(source, buffering=0) as file:  # it reads a few bytes here and there
            exif, xmp, bits = _read_png_notes(file)
    orientation = _tiff_orientation(image) if image.format == "TIFF" else None
    if orientation is None and isinstance(exif, bytes):
        orientation = _exif_orientation(exif)
    if orientation is None and isinstance(xmp, bytes):
        match = _XMP_ORIENTATION.search(xmp)
        orientation = int(match[1]) if match else None
    return (orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1), bits


def _exif_orientation(exif: bytes) -> int | None:
    """Find the orientation among a picture's camera data, which are laid out as a TIFF file."""
    tiff = re.sub(rb"^(?:Exif\0\0){1,2}", b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}L", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for start in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHL", tiff, start)
            if tag == _ORIENTATION_TAG and count == 1 and kind in _EXIF_INTEGERS:
                return int(struct.unpack_from(f"{order}{_EXIF_INTEGERS[kind]}", tiff, start + 8)[0])
    except struct.error:
        return None  # cut off; beside sound pixels that is no reason to reject the picture
    return None


def _read_png_notes(file: IO[bytes]) -> tuple[bytes | None, bytes | None, int | None]:
    """Walk a PNG's chunks for its camera data, XMP data and bits a channel; they may follow the pixels."""
    exif: bytes | None = None
    profile: bytes | None = None
    xmp: bytes | None = None
    bits: int | None = None
    file.seek(_PNG_SIGNATURE_BYTES)
    for _ in range(_PNG_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            break
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        wanted = kind in (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length <= _PNG_LONGEST_NOTE
        content = file.read(length) if wanted else b""
        file.seek(length - len(content) + 4, os.SEEK_CUR)
        if kind == b"IHDR" and len(content) > 8:
            bits = content[8]
        elif kind == b"eXIf":
            exif = content
        elif content.startswith(b"Raw profile type exif\0"):
            profile = _profile_bytes(_png_text(kind, content))
        elif content.startswith(b"XML:com.adobe.xmp\0"):
            xmp = _png_text(kind, content)
    return exif or profile, xmp, bits


def _png_text(kind: bytes, content: bytes) -> bytes:
    """Take the text out of one of a PNG's three kinds of text chunk; empty where it is damaged."""
    text = content.partition(b"\0")[2]
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        compressed = text[:1] == b"\1"
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif compressed:
        text = text[1:]
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _PNG_LONGEST_NOTE)
    except zlib.error:
        return b""


def _profile_bytes(text: bytes) -> bytes:
    """Undo the hexadecimal form that ImageMagick gives camera data: a name and a length on lines of their own."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""
