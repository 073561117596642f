"""A data set of good pictures with one fault of each kind planted among them, for whoever tests a check of data."""

from __future__ import annotations

import os
import shutil
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
"""Training size that the good pictures suit."""

COLOURS = ("red", "green", "blue", "grey", "brown", "pink", "white")
THINGS = ("cat", "house", "tree", "boat", "lamp", "clock", "bridge", "flower", "chair", "horse", "river", "street")
PLACES = ("at dawn", "in the rain", "by the sea", "in the snow", "on a hill", "in a garden")


@dataclass(frozen=True)
class Planted:
    """A fault: the path that has to be named, and the kind of finding."""

    path: str
    kind: str


def picture(number: int, width: int = 96, height: int = 80) -> Image.Image:
    """Draw a picture that looks like no other: a few soft blots of colour."""
    rough = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def good_caption(number: int) -> str:
    colour, rest = COLOURS[number % len(COLOURS)], number // len(COLOURS)
    thing, rest = THINGS[rest % len(THINGS)], rest // len(THINGS)
    return f"a photo of a {colour} {thing} {PLACES[rest]}"


def add_good_pictures(root: Path, count: int) -> list[str]:
    """Write good pictures of several shapes and formats into two folders; returns their paths."""
    paths = []
    shapes = ((96, 80), (64, 64), (160, 80), (70, 130), (200, 150))
    for number in range(count):
        suffix = (".jpg", ".png", ".webp", ".jpeg", ".PNG")[number % 5]
        path = root / ("man" if number % 2 else "man_laion") / f"{good_caption(number)}_({number}){suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, *shapes[number % len(shapes)]).save(path)
        paths.append(str(path))
    return paths


def plant(root: Path) -> list[Planted]:
    """Add one fault of each kind to a data set that holds good pictures.

    Returns:
        What a check that decodes every pixel has to find; every other path is good.
    """
    new = root / "new"
    new.mkdir()
    planted: list[Planted] = []

    def add(kind: str, name: str) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        planted.append(Planted(str(path), kind))
        return path

    add("unreadable", "new/text in a picture's clothes.jpg").write_text("no picture", encoding="utf-8")
    whole = new / "a whole photo.jpg"
    picture(900).save(whole)
    add("unreadable", "new/half a photo.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    add("empty_file", "new/nothing at all.png").touch()
    _write_bomb(add("decompression_bomb", "new/a small file that unfolds.png"))
    picture(901).save(add("wrong_extension", "new/a bitmap called photo.jpg"), "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(902).save(add("rotated", "new/a tower lying on its side.jpg"), exif=exif)
    glass = picture(903).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(add("transparent", "new/a bottle of glass.png"))
    solid = picture(904).convert("RGBA")
    solid.save(new / "an opaque bottle.png")  # has an alpha channel, and is good
    picture(905, 20, 20).save(add("tiny", "new/a stamp.png"))
    picture(906, 41, 41).save(add("upscaled", "new/a small poster.png"))
    picture(907, 900, 70).save(add("extreme_aspect", "new/a wide horizon.png"))
    deep = np.random.default_rng(908).integers(0, 65536, (80, 96), dtype=np.uint16)
    Image.fromarray(deep).save(add("sixteen_bit", "new/an x-ray.png"))
    picture(909).convert("CMYK").save(add("cmyk", "new/a printed page.jpg"))
    frames = [picture(number) for number in (910, 911, 912)]
    frames[0].save(add("animated", "new/a dancer.webp"), save_all=True, append_images=frames[1:])
    original = new / "a painting of a storm.png"
    picture(913).save(original)
    shutil.copy(original, add("duplicate", "new/the storm once more.png"))
    photo = new / "a photo of a market.png"
    picture(914, 160, 120).save(photo)
    picture(914, 160, 120).resize((120, 90)).save(add("near_duplicate", "new/the market again.jpg"), quality=60)
    for number, name in ((915, "monday"), (916, "tuesday")):
        picture(number).save(add("shared_caption", f"new/{name}.png"))
        text = "a tall man in a yellow coat sells oranges to two children"
        (new / f"{name}.txt").write_text(text, encoding="utf-8")
    picture(917).save(add("empty_caption", "new/_01.png"))
    picture(918).save(add("cut_caption", "new/a long story.png"))
    (new / "a long story.txt").write_text("word " * 90, encoding="utf-8")
    add("orphan", "new/a lost text.txt").write_text("nobody", encoding="utf-8")
    add("bad_sidecar", "new/a cafe.txt").write_bytes("un café".encode("latin-1"))
    picture(919).save(new / "a cafe.png")
    picture(920).save(add("other_format", "new/a moving sign.gif"))
    picture(921).save(add("in_root", "a picture that strayed.png"))
    picture(922).save(add("too_deep", "new/inner/a picture out of reach.png"))
    off = add("switched_off", "off")
    off.mkdir()
    picture(923).save(off / "an unwanted picture.png")
    (off / "multiply.txt").write_text("0", encoding="utf-8")
    if sys.platform != "win32":
        os.symlink(root, add("link_loop", "new/back to the start"), target_is_directory=True)
    _plant_missing_caption(add, root)
    return planted


def _plant_missing_caption(add, root: Path) -> None:
    """A folder in which one picture of six lacks its caption file."""
    for number in range(6):
        name = f"tagged/{COLOURS[number]} leaves.png"
        path = add("missing_caption", name) if number == 3 else root / name
        path.parent.mkdir(exist_ok=True)
        picture(940 + number).save(path)
        if number != 3:
            path.with_suffix(".txt").write_text(f"a drawing, number {number}", encoding="utf-8")


def _write_bomb(path: Path) -> None:
    """Write a PNG of a few bytes whose header promises 1,600 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))))
