import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin, features

from ldm.data import picture_header
from ldm.data.image_transform import read_picture
from ldm.data.picture_header import MAX_PIXELS, read_header, read_headers

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
ORIENTATIONS = range(1, 9)


def upright(orientation: int):
    turned = {1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2)}
    turned |= {6: np.rot90(PIXELS, -1), 7: np.rot90(PIXELS, 1)[:, ::-1], 8: np.rot90(PIXELS, 1)}
    return turned[orientation]


def exif(orientation: int) -> bytes:
    camera_data = Image.Exif()
    camera_data[0x010F] = "maker"
    camera_data[0x0112] = orientation
    return camera_data.tobytes()


def xmp(orientation: int) -> bytes:
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return content.getvalue()


def chunk_last(png: bytes, kind: bytes) -> bytes:
    """Move a chunk of a PNG behind its pixels."""
    start = png.index(kind) - 4
    chunk = png[start : start + 12 + int.from_bytes(png[start : start + 4], "big")]
    rest = png.replace(chunk, b"")
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


def png_text(key: str, text: str, compress: bool = False, international: bool = False) -> bytes:
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if international else info.add_text)(key, text, zip=compress)
    return encode(PICTURE, "PNG", pnginfo=info)


def profile(orientation: int) -> str:
    content = exif(orientation)
    return f"\nexif\n{len(content):8d}\n{content.hex()}\n"


LOSSLESS = {
    "png": lambda o: encode(PICTURE, "PNG", exif=exif(o)),
    "png, after the pixels": lambda o: chunk_last(encode(PICTURE, "PNG", exif=exif(o)), b"eXIf"),
    "png, profile": lambda o: png_text("Raw profile type exif", profile(o)),
    "png, compressed profile": lambda o: png_text("Raw profile type exif", profile(o), compress=True),
    "png, XMP": lambda o: png_text("XML:com.adobe.xmp", xmp(o).decode(), international=True),
    "png, compressed XMP after the pixels": lambda o: chunk_last(
        png_text("XML:com.adobe.xmp", xmp(o).decode(), compress=True, international=True), b"iTXt"
    ),
    "webp": lambda o: encode(PICTURE, "WEBP", lossless=True, exif=exif(o)),
    "webp, XMP": lambda o: encode(PICTURE, "WEBP", lossless=True, xmp=xmp(o)),
    "tiff": lambda o: encode(PICTURE, "TIFF", tiffinfo={0x0112: o}),
    "tiff, compressed": lambda o: encode(PICTURE, "TIFF", tiffinfo={0x0112: o}, compression="tiff_lzw"),
    "tiff, XMP": lambda o: encode(PICTURE, "TIFF", tiffinfo={700: xmp(o)}),
    "tiff of two pages": lambda o: encode(
        PICTURE, "TIFF", tiffinfo={0x0112: o}, save_all=True, append_images=[PICTURE]
    ),
}
LOSSY = {
    "jpeg": lambda o: encode(PICTURE, "JPEG", exif=exif(o)),
    "jpeg, XMP": lambda o: encode(PICTURE, "JPEG", xmp=xmp(o)),
    "jpeg with a second picture": lambda o: encode(
        PICTURE, "MPO", exif=exif(o), save_all=True, append_images=[PICTURE]
    ),
}
if features.check_module("webp") and "avif" in features.modules and features.check_module("avif"):
    LOSSY["avif"] = lambda o: encode(PICTURE, "AVIF", exif=exif(o))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_header_and_the_pixels_agree_on_what_is_upright(tmp_path: Path, kind: str) -> None:
    for orientation in ORIENTATIONS:
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(LOSSLESS[kind](orientation))
        header = read_header(str(path))
        pixels = np.asarray(read_picture(str(path)))
        assert (header.height, header.width, header.orientation) == (*pixels.shape[:2], orientation)
        np.testing.assert_array_equal(pixels, upright(orientation))


@pytest.mark.parametrize("kind", LOSSY)
def test_a_header_and_the_pixels_agree_where_compression_loses_some(tmp_path: Path, kind: str) -> None:
    for orientation in ORIENTATIONS:
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(LOSSY[kind](orientation))
        header = read_header(str(path))
        assert (header.width, header.height) == read_picture(str(path)).size
        assert (header.width, header.height) == ((20, 30) if orientation > 4 else (30, 20))


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_header_is_read_without_decoding_a_pixel(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    content = io.BytesIO(LOSSLESS[kind](6))

    def decode(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{image.format} was decoded")

    for reader in (ImageFile.ImageFile, *ImageFile.ImageFile.__subclasses__()):
        if "load" in vars(reader):
            monkeypatch.setattr(reader, "load", decode)
    assert read_header(content).width == 20


def test_a_stream_gives_the_same_header_as_its_file(tmp_path: Path) -> None:
    content = LOSSLESS["png, after the pixels"](6)
    (tmp_path / "a.png").write_bytes(content)
    assert read_header(io.BytesIO(content)) == read_header(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(PICTURE, "JPEG"), ("JPEG", "RGB", 8, False, 1)),
        (encode(PICTURE, "MPO", save_all=True, append_images=[PICTURE]), ("JPEG", "RGB", 8, False, 1)),
        (encode(PICTURE.convert("CMYK"), "JPEG"), ("JPEG", "CMYK", 8, False, 1)),
        (encode(PICTURE.convert("RGBA"), "PNG"), ("PNG", "RGBA", 8, True, 1)),
        (encode(PICTURE.convert("P"), "PNG", transparency=3), ("PNG", "P", 8, True, 1)),
        (encode(Image.new("I;16", (4, 4)), "PNG"), ("PNG", "I;16", 16, False, 1)),
        (encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]), ("PNG", "RGB", 8, False, 2)),
        (encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(180)]), ("GIF", "P", 8, False, 2)),
        (encode(PICTURE, "TIFF", save_all=True, append_images=[PICTURE] * 2), ("TIFF", "RGB", 8, False, 3)),
        (encode(PICTURE, "BMP"), ("BMP", "RGB", 8, False, 1)),
        (encode(Image.new("F", (4, 4)), "TIFF"), ("TIFF", "F", 32, False, 1)),
    ],
    ids=["jpeg", "mpo", "cmyk", "rgba", "palette", "16 bit", "apng", "gif", "pages", "bmp", "float"],
)
def test_a_header_tells_what_training_will_have_to_convert(content: bytes, expected: tuple[object, ...]) -> None:
    header = read_header(io.BytesIO(content))
    assert (header.format, header.mode, header.bits, header.transparent, header.frames) == expected
    assert header.file_bytes == len(content)


def test_many_headers_are_read_in_order_with_the_reasons_of_the_broken(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    paths = [str(tmp_path / name) for name in ("b.png", "a.png", "gone.png", "a.png")]
    seen: list[int] = []
    found = read_headers(paths, threads=2, progress=seen.append)
    assert list(found) == paths[:3]
    assert "not a picture" in str(found[paths[0]])
    assert found[paths[1]] == read_header(paths[1])
    assert found[paths[2]] == "No such file or directory"
    assert seen == [1, 1, 1]


def test_results_come_in_order_and_not_all_are_held_at_once() -> None:
    started: list[int] = []
    results = picture_header.map_in_threads(lambda item: started.append(item) or -item, range(1000), 2)
    assert next(results) == (0, 0)
    assert len(started) < 100
    assert list(results) == [(item, -item) for item in range(1, 1000)]


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    png = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    png[16:24] = (20_000).to_bytes(4, "big") * 2
    png[29:33] = picture_header.zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    for read in (read_header, read_picture):
        with pytest.raises(OSError, match="decompression bomb"):
            read(io.BytesIO(bytes(png)))


def test_the_limit_is_the_one_that_pillow_refuses_at() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_a_picture_whose_reader_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_header, "MAX_DECODE_BYTES", 16 * 30 * 20 - 1)
    assert read_header(io.BytesIO(encode(PICTURE, "PNG"))).width == 30
    with pytest.raises(OSError, match=r"too large to decode safely: 0 megapixels of WEBP take 0\.0 GB"):
        read_header(io.BytesIO(encode(PICTURE, "WEBP")))


def test_formats_that_would_run_a_program_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(PICTURE, "EPS"))
    with pytest.raises(OSError, match=r"not a picture.*JPEG, PNG, WEBP"):
        read_header(str(tmp_path / "a.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    found = read_headers([str(tmp_path / name) for name in ("pipe.jpg", "folder.jpg")])
    assert list(found.values()) == ["not a regular file", "a folder, not a picture"]


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_out_of_range_turns_nothing(value: int) -> None:
    content = io.BytesIO(encode(PICTURE, "PNG", exif=exif(value)))
    assert read_header(content).orientation == 1
    np.testing.assert_array_equal(np.asarray(read_picture(content)), PIXELS)


def test_camera_data_cut_short_turn_nothing() -> None:
    whole = exif(6)
    for length in range(6, len(whole)):
        assert read_header(io.BytesIO(encode(PICTURE, "PNG", exif=whole[:length]))).orientation in (1, 6)


def test_remarks_about_damaged_camera_data_stay_off_the_console(tmp_path: Path) -> None:
    jpeg = bytearray(encode(PICTURE, "JPEG", exif=exif(6)))
    directory = jpeg.index(b"MM\0*") + 8
    jpeg[directory : directory + 2] = (200).to_bytes(2, "big")
    (tmp_path / "a.jpg").write_bytes(bytes(jpeg).replace(b"JFIF\0\1\1\1", b"JFIF\0\1\1\0"))
    (tmp_path / "b.jpg").write_bytes(encode(PICTURE, "TIFF", tiffinfo={0x010F: "maker of cameras"})[:-40])
    script = (
        "import sys, warnings; from PIL import Image; from ldm.data.image_transform import find_broken_pictures\n"
        "from ldm.data.picture_header import read_headers\n"
        "if sys.argv[1] == 'bare': [Image.open(path).getexif() for path in sys.argv[2:]]\n"
        "else: read_headers(sys.argv[2:]); find_broken_pictures(sys.argv[2:])\n"
    )
    paths = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]

    def console(kind: str) -> str:
        return subprocess.run([sys.executable, "-c", script, kind, *paths], capture_output=True, text=True).stderr

    assert "Warning" in console("bare")
    assert console("ours") == ""


def tiff_page(tags: dict[int, int], following: int = 0) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)


def test_a_tiff_of_very_many_pages_is_not_walked_to_its_end(tmp_path: Path) -> None:
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 278: 8, 279: 64}
    pages, length = 3000, len(tiff_page(tags))
    content = b"II*\0" + struct.pack("<I", 72) + b"\x10" * 64
    content += b"".join(tiff_page(tags, 72 + page * length if page < pages else 0) for page in range(1, pages + 1))
    path = tmp_path / "pages.png"
    path.write_bytes(content)
    assert read_header(path).frames == 1000


def test_a_tile_counts_that_is_larger_than_its_picture(tmp_path: Path) -> None:
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40_000, 323: 40_000, 324: 8, 325: 4}
    path = tmp_path / "tile.png"
    path.write_bytes(b"II*\0" + struct.pack("<I", 12) + b"\0" * 4 + tiff_page(tags))
    with pytest.raises(OSError, match="too large to decode safely"):
        read_header(path)
