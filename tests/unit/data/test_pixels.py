from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.data.fingerprints import groups_of_lookalikes
from ldm.data.picture_header import read_headers
from ldm.data.pixels import is_opaque, look_at_pixels


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def look(*paths: Path):
    return look_at_pixels(read_headers([str(path) for path in paths]), threads=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_looks_like_its_upright_twin(tmp_path: Path, orientation: int) -> None:
    stored = scene(1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        upright = ImageOps.exif_transpose(opened)
    upright.save(tmp_path / "upright.png", exif=Image.Exif())
    thumbnails = look(tmp_path / "turned.png", tmp_path / "upright.png").thumbnails
    assert groups_of_lookalikes(np.stack(list(thumbnails.values()))) == [[0, 1]]


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "RGB"])
def test_a_picture_looks_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    scene(1).save(tmp_path / "a.png")
    suffix = "jpg" if mode == "CMYK" else "png"
    scene(1).convert(mode).save(tmp_path / f"b.{suffix}")
    thumbnails = look(tmp_path / "a.png", tmp_path / f"b.{suffix}").thumbnails
    assert groups_of_lookalikes(np.stack(list(thumbnails.values()))) == [[0, 1]]


def test_a_large_photo_looks_like_its_small_copy(tmp_path: Path) -> None:
    large = scene(1, (2400, 1600))
    large.save(tmp_path / "large.jpg")  # is decoded at an eighth of its size
    large.resize((90, 60)).save(tmp_path / "small.jpg")  # is decoded whole
    thumbnails = look(tmp_path / "large.jpg", tmp_path / "small.jpg").thumbnails
    assert groups_of_lookalikes(np.stack(list(thumbnails.values()))) == [[0, 1]]


def test_broken_pixels_are_told_and_have_no_thumbnail(tmp_path: Path) -> None:
    scene(1).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) * 3 // 4])
    (tmp_path / "none.jpg").write_bytes(b"no picture")
    pixels = look(tmp_path / "half.jpg", tmp_path / "none.jpg", tmp_path / "whole.jpg")
    assert list(pixels.broken) == [str(tmp_path / "half.jpg")]
    assert list(pixels.thumbnails) == [str(tmp_path / "whole.jpg")]


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        scene(number).save(path)
    counted: list[int] = []
    look_at_pixels(read_headers([str(path) for path in paths]), progress=counted.append)
    assert sum(counted) == 5


def with_alpha(mode: str, alpha: int) -> Image.Image:
    image = Image.new(mode, (4, 4))
    image.putalpha(255)
    image.putpixel((1, 1), (*image.getpixel((1, 1))[:-1], alpha))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_one_transparent_pixel_makes_a_picture_transparent(mode: str) -> None:
    assert is_opaque(with_alpha(mode, 255))
    assert not is_opaque(with_alpha(mode, 254))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
def test_a_palette_is_transparent_only_where_such_a_colour_is_used(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 0)
    image.info["transparency"] = transparency
    assert is_opaque(image)
    image.putpixel((0, 0), 1)
    assert not is_opaque(image)
