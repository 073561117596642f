"""The file's values are compared with the recordings in tests/assets/dataset_pixels.npz (see dataset_pixels.md)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ldm.data.image_transform import (
    find_broken_pictures,
    read_picture,
    resample_filter,
    resolve_resize_mode,
    to_training_array,
)

RECORDED = np.load(Path(__file__).parents[2] / "assets" / "dataset_pixels.npz")
BICUBIC = resample_filter("bicubic")
EXACT = 1e-6
REDUCED = 0.08
GRADIENT = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def save(path: Path, pixels: npt.NDArray[np.generic], mode: str | None = None, **options: object) -> str:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return str(path)


def transformed(path: str, size: int | None, resize_mode: str = "squash", flip: bool = False, name: str = "bicubic"):
    return to_training_array(read_picture(path), size, resize_mode, resample_filter(name), flip)


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "linear", "lanczos"])
def test_enlarging_gives_the_recorded_values(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/small_5x7"])
    np.testing.assert_allclose(
        transformed(path, 16, name=name), RECORDED[f"resize/small_to_16/{name}"], rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "linear", "lanczos"])
def test_reducing_gives_one_of_the_recorded_values(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/big_40x23"])
    result = transformed(path, 16, name=name)
    key = f"resize/big_to_16/{name}"
    assert min(np.abs(result - RECORDED[prefix + key]).max() for prefix in ("", "pillow9.5.0/")) <= REDUCED


def test_a_mirrored_picture_gives_the_recorded_values(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/big_40x23"])
    result = transformed(path, 16, flip=True)
    key = "resize/big_flip1_16"
    assert min(np.abs(result - RECORDED[prefix + key]).max() for prefix in ("", "pillow9.5.0/")) <= REDUCED


def test_without_a_size_nothing_is_resized(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/big_40x23"])
    np.testing.assert_array_equal(transformed(path, None), RECORDED["resize/big_none"])


def test_a_center_crop_gives_the_recorded_values(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/small_5x7"])
    np.testing.assert_array_equal(transformed(path, None, "center_crop"), RECORDED["resize/small_center_crop_none"])


def test_a_reduced_center_crop_is_near_the_recorded_values(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RECORDED["src/big_40x23"])
    np.testing.assert_allclose(
        transformed(path, 16, "center_crop"), RECORDED["resize/big_center_crop_16"], rtol=0, atol=REDUCED
    )


COLOURS = RECORDED["src/mode_8x8"]
MODES = {
    "RGB": (Image.fromarray(COLOURS), "png", {}, 0),
    "L": (Image.fromarray(COLOURS[..., 0]), "png", {}, 0),
    "1": (Image.fromarray(COLOURS[..., 0]).convert("1", dither=Image.Dither.NONE), "png", {}, 0),
    "webp_lossless": (Image.fromarray(COLOURS), "webp", {"lossless": True}, 0),
    "bmp": (Image.fromarray(COLOURS), "bmp", {}, 0),
    "CMYK_jpg": (
        Image.fromarray(np.dstack([COLOURS, RECORDED["src/mode_alpha"]]), mode="CMYK"),
        "jpg",
        {"quality": 100, "subsampling": 0},
        2 / 127.5,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_converted_as_recorded(tmp_path: Path, name: str) -> None:
    image, suffix, options, tolerance = MODES[name]
    image.save(tmp_path / f"a.{suffix}", **options)
    result = transformed(str(tmp_path / f"a.{suffix}"), 8)
    np.testing.assert_allclose(result, RECORDED[f"mode/{name}"], rtol=0, atol=tolerance)


def test_values_are_exactly_value_over_127_5_minus_1_in_float32(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    result = transformed(save(tmp_path / "a.png", pixels), None)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, (pixels / 127.5 - 1.0).astype(np.float32))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, GRADIENT),
        (2, GRADIENT[:, ::-1]),
        (3, GRADIENT[::-1, ::-1]),
        (4, GRADIENT[::-1]),
        (5, GRADIENT.transpose(1, 0, 2)),
        (6, np.rot90(GRADIENT, -1)),
        (7, np.rot90(GRADIENT, 1)[:, ::-1]),
        (8, np.rot90(GRADIENT, 1)),
    ],
)
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int, upright: npt.NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", GRADIENT, exif=exif.tobytes())
    np.testing.assert_array_equal(np.asarray(read_picture(path)), upright)


def test_damaged_camera_data_do_not_spoil_a_sound_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GRADIENT, exif=b"Exif\0\0no camera data")
    np.testing.assert_array_equal(np.asarray(read_picture(path)), GRADIENT)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    result = np.asarray(read_picture(save(tmp_path / "a.png", pixels)))
    np.testing.assert_array_equal(result, [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]])


def test_grey_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (50, 255))
    image.putpixel((1, 0), (50, 0))
    image.save(tmp_path / "a.png")
    assert np.asarray(read_picture(str(tmp_path / "a.png")))[0].tolist() == [[50] * 3, [255] * 3]


def test_a_transparent_palette_colour_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert np.asarray(read_picture(str(tmp_path / "a.png")))[0].tolist() == [[255, 255, 255], [200, 0, 0]]


def test_a_transparent_colour_of_an_rgb_picture_is_laid_on_white(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8), transparency=(1, 2, 3))
    assert np.asarray(read_picture(path))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_sixteen_bit_values_are_scaled_to_eight(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16))
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_dark_sixteen_bit_pictures_stay_dark(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.array([[0, 2570]], dtype=np.uint16))
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 10]


def test_float_values_are_scaled_from_their_own_range(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", np.array([[-1.0, 0.0, 1.0, np.nan]], dtype=np.float32))
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(read_picture(str(tmp_path / "a.webp")))[0, 0].tolist() == [255, 0, 0]


def test_the_content_decides_the_format_and_not_the_suffix(tmp_path: Path) -> None:
    Image.fromarray(GRADIENT).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(np.asarray(read_picture(str(tmp_path / "a.jpg"))), GRADIENT)


def test_an_unknown_interpolation_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"interpolation 'nearest' is unknown.*linear, bilinear, bicubic, lanczos"):
        resample_filter("nearest")


@pytest.mark.parametrize(
    ("resize_mode", "center_crop", "resolved"),
    [
        (None, False, "bucket"),
        (None, True, "center_crop"),
        ("squash", False, "squash"),
        ("center_crop", False, "center_crop"),
        ("center_crop", True, "center_crop"),
        ("bucket", False, "bucket"),
    ],
)
def test_the_two_resize_keys_settle_on_one_mode(resize_mode: str | None, center_crop: bool, resolved: str) -> None:
    assert resolve_resize_mode(resize_mode, center_crop) == resolved


@pytest.mark.parametrize(
    ("resize_mode", "center_crop", "message"),
    [
        ("stretch", False, "'stretch' is unknown; choose one of bucket, squash, center_crop"),
        ("squash", True, "contradicts center_crop"),
    ],
)
def test_other_resize_keys_are_errors(resize_mode: str, center_crop: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_resize_mode(resize_mode, center_crop)


def test_every_broken_picture_is_found_with_its_reason(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", GRADIENT)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = Path(save(tmp_path / "whole.jpg", noise)).read_bytes()
    broken = {"empty.png": b"", "text.png": b"no picture", "cut.jpg": whole[: len(whole) // 2]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    found = find_broken_pictures([good, *(str(tmp_path / name) for name in broken), str(tmp_path / "gone.png")])
    assert [Path(path).name for path in found] == ["empty.png", "text.png", "cut.jpg", "gone.png"]
    assert ["not a picture" in reason for reason in found.values()] == [True, True, False, False]
    assert "truncated" in found[str(tmp_path / "cut.jpg")]


def test_a_picture_named_twice_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **kwargs: opened.append(file.name) or real_open(file, **kwargs))
    path = save(tmp_path / "a.png", GRADIENT)
    find_broken_pictures([path, path])
    assert opened == [path]


def test_a_broken_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"a\.png: not a picture"):
        read_picture(str(tmp_path / "a.png"))
