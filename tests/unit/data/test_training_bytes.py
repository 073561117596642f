"""What is trained on, from a file: where the reduced decoding of JPEGs applies, and where nothing may change."""

import io
import math
from pathlib import Path
from threading import Event, Lock, Thread

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ldm.data import image_transform
from ldm.data.image_transform import (
    Placement,
    find_broken_pictures,
    place,
    read_picture,
    read_training_bytes,
    resample_filter,
    to_training_array,
    to_unit_range,
)

BICUBIC = resample_filter("bicubic")
ORIENTATIONS = range(1, 9)


def scene(width: int, height: int) -> Image.Image:
    """Draw a picture with detail at every scale, as photographs have it, none of it symmetric."""
    rng = np.random.default_rng(3)
    picture = np.full((height, width, 3), 128.0, dtype=np.float32)
    for step in (64, 32, 16, 8, 4, 2):
        cells = rng.standard_normal((height // step + 2, width // step + 2, 3), dtype=np.float32)
        for channel in range(3):
            layer = Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            picture[..., channel] += 5 * step**0.5 * np.asarray(layer)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


SCENE = scene(403, 301)


def encode(image: Image.Image, kind: str, orientation: int = 1, **options: object) -> io.BytesIO:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    image.save(content, format=kind, exif=exif.tobytes(), **options)
    return content


JPEG = encode(SCENE, "JPEG", quality=92)


def stored_for(orientation: int) -> Image.Image:
    """Turn the scene so that its orientation makes it upright again."""
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = undo.get(orientation, image_transform._UPRIGHT.get(orientation))
    return SCENE if turn is None else SCENE.transpose(turn)


def decoded_whole(source: io.BytesIO, placement: Placement) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(read_picture(source).resize(placement.size, BICUBIC, placement.box))
    return pixels[:, ::-1] if placement.flip else pixels


def signal_to_noise(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio in decibels."""
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    sizes: list[tuple[int, int]] = []
    real = image_transform.to_rgb
    monkeypatch.setattr(image_transform, "to_rgb", lambda image: sizes.append(image.size) or real(image))
    return sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("resize_mode", ["squash", "center_crop"])
@pytest.mark.parametrize("flip", [False, True])
def test_squares_are_bit_for_bit_what_they_were(kind: str, resize_mode: str, flip: bool) -> None:
    source = encode(SCENE, kind)
    size = 40 if resize_mode == "squash" else 176  # the latter leaves nothing to spare for a reduced decoding
    pixels = read_training_bytes(
        source, place(SCENE.size, (size, size), resize_mode, "center", (0, 0), flip), resize_mode, BICUBIC
    )
    expected = to_training_array(read_picture(source), size, resize_mode, BICUBIC, flip)
    np.testing.assert_array_equal(to_unit_range(pixels), expected)


@pytest.mark.parametrize("resize_mode", ["squash", "center_crop", "bucket"])
def test_without_a_size_the_pixels_are_the_files_own(resize_mode: str) -> None:
    placement = place(SCENE.size, None, resize_mode, "center", (0, 0), False)
    left, top, right, bottom = map(int, placement.box)
    whole = np.asarray(read_picture(JPEG))
    np.testing.assert_array_equal(
        read_training_bytes(JPEG, placement, resize_mode, BICUBIC), whole[top:bottom, left:right]
    )


@pytest.mark.parametrize(
    ("size", "resize_mode", "decoded"),
    [
        ((104, 104), "bucket", (403, 301)),
        ((96, 96), "bucket", (202, 151)),
        ((48, 48), "bucket", (101, 76)),
        ((24, 24), "bucket", (51, 38)),
        ((96, 96), "center_crop", (202, 151)),
        ((16, 16), "squash", (403, 301)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_half_as_much_again_as_is_needed(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], resize_mode: str, decoded: tuple[int, int]
) -> None:
    sizes = decoded_sizes(monkeypatch)
    read_training_bytes(JPEG, place(SCENE.size, size, resize_mode, "center", (0, 0), False), resize_mode, BICUBIC)
    assert sizes == [decoded]


@pytest.mark.parametrize("size", [(96, 96), (72, 72), (64, 32), (32, 64), (16, 16)])
@pytest.mark.parametrize("resize_mode", ["bucket", "center_crop"])
def test_a_reduced_decoding_looks_like_a_whole_one(size: tuple[int, int], resize_mode: str) -> None:
    size = size if resize_mode == "bucket" else (size[0], size[0])
    placement = place(SCENE.size, size, resize_mode, "random", (0.3, 0.7), False)
    reduced, whole = read_training_bytes(JPEG, placement, resize_mode, BICUBIC), decoded_whole(JPEG, placement)
    assert np.abs(reduced.astype(int) - whole).mean() < 1.5
    assert signal_to_noise(reduced, whole) > 40


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_turned_jpeg_shows_the_same_part_when_its_decoding_is_reduced(crop: str, flip: bool) -> None:
    # At an eighth of the size a part that is off by the rounding of 301 or 403 pixels would be seen.
    placement = place(SCENE.size, (16, 16), "bucket", crop, (0.9, 0.9), flip)
    upright = decoded_whole(JPEG, placement)
    for orientation in ORIENTATIONS:
        turned = encode(stored_for(orientation), "JPEG", orientation, quality=92)
        shown = read_training_bytes(turned, placement, "bucket", BICUBIC)
        assert signal_to_noise(shown, upright) > 38, orientation


def test_a_part_off_by_a_fraction_of_a_pixel_would_have_been_seen() -> None:
    left, top, right, bottom = place(SCENE.size, (16, 16), "bucket", "random", (0.9, 0.9), False).box
    right_one, off = ((left, top, right, bottom), (left - 4, top, right - 4, bottom))
    assert signal_to_noise(*(decoded_whole(JPEG, Placement((16, 16), box, False)) for box in (right_one, off))) < 32


def test_a_turned_picture_without_loss_gives_the_same_bytes() -> None:
    placement = place(SCENE.size, (48, 64), "bucket", "random", (0.3, 0.6), True)
    expected = read_training_bytes(encode(SCENE, "PNG"), placement, "bucket", BICUBIC)
    for orientation in ORIENTATIONS:
        turned = encode(stored_for(orientation), "PNG", orientation)
        np.testing.assert_array_equal(read_training_bytes(turned, placement, "bucket", BICUBIC), expected)


def test_the_same_placement_gives_the_same_new_array_each_time(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG.getvalue())
    placement = place(SCENE.size, (64, 48), "bucket", "jitter", (0.3, 0.6), True)
    first = read_training_bytes(str(tmp_path / "a.jpg"), placement, "bucket", BICUBIC)
    assert (first.shape, first.dtype, first.flags.writeable) == ((48, 64, 3), np.uint8, True)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(read_training_bytes(tmp_path / "a.jpg", placement, "bucket", BICUBIC), kept)
    np.testing.assert_array_equal(read_training_bytes(JPEG, placement, "bucket", BICUBIC), kept)


def test_a_mirrored_placement_gives_the_mirrored_bytes() -> None:
    straight, mirrored = (place(SCENE.size, (64, 48), "bucket", "random", (0.3, 0.6), flip) for flip in (False, True))
    np.testing.assert_array_equal(
        read_training_bytes(JPEG, mirrored, "bucket", BICUBIC),
        read_training_bytes(JPEG, straight, "bucket", BICUBIC)[:, ::-1],
    )


def test_a_file_that_shrank_since_it_was_placed_is_an_error_that_names_it(tmp_path: Path) -> None:
    SCENE.resize((100, 75)).save(tmp_path / "a.jpg")
    placement = place(SCENE.size, (64, 48), "bucket", "center", (0, 0), False)
    with pytest.raises(OSError, match=r"a\.jpg: is 100x75 pixels now, less than"):
        read_training_bytes(str(tmp_path / "a.jpg"), placement, "bucket", BICUBIC)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_the_check_finds_a_cut_jpeg_wherever_a_whole_decoding_does(tmp_path: Path, options: dict[str, bool]) -> None:
    content = encode(SCENE, "JPEG", **options).getvalue()
    paths = []
    for cut in (*range(700, len(content), len(content) // 12), len(content) - 2, len(content)):
        paths.append(str(tmp_path / f"{cut}.jpg"))
        Path(paths[-1]).write_bytes(content[:cut])

    def fails(path: str) -> bool:
        try:
            read_picture(path)
        except OSError:
            return True
        return False

    broken = [path for path in paths if fails(path)]
    assert 12 <= len(broken) < len(paths)
    assert list(find_broken_pictures(paths)) == broken


def test_a_jpeg_of_endless_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encode(SCENE, "JPEG", progressive=True)
    assert read_picture(source).size == SCENE.size
    monkeypatch.setattr(image_transform, "_MOST_PASSES", 3 * SCENE.width * SCENE.height)
    with pytest.raises(OSError, match="so many scans"):
        read_picture(source)
    assert read_picture(JPEG).size == SCENE.size


def test_large_pictures_wait_for_each_other_and_small_ones_do_not() -> None:
    memory = image_transform._Memory(100)
    running, most, lock, finish = [0], [0], Lock(), Event()

    def hold(needed: int) -> None:
        with memory.reserve(needed):
            with lock:
                running[0] += needed
                most[0] = max(most[0], running[0])
            finish.wait(0.02)
            with lock:
                running[0] -= needed

    threads = [Thread(target=hold, args=(needed,)) for needed in (60, 60, 100, 10, 20, 60, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert 60 <= most[0] <= 100


def test_a_conversion_in_strips_is_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Image.fromarray(np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32))
    pictures = [SCENE.convert("RGBA"), SCENE.convert("CMYK"), SCENE.convert("P"), wide, SCENE.convert("L")]
    pictures[0].putalpha(SCENE.getchannel("R"))
    at_once = [np.asarray(image_transform.to_rgb(picture)) for picture in pictures]
    monkeypatch.setattr(image_transform, "_STRIP_PIXELS", 1000)
    for picture, expected in zip(pictures, at_once, strict=True):
        np.testing.assert_array_equal(np.asarray(image_transform.to_rgb(picture)), expected)


@pytest.mark.parametrize(("memory", "together"), [(80_000, 1), (160_000, 2)])
def test_the_check_decodes_as_many_at_a_time_as_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, together: int
) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    for path in paths:
        Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(image_transform, "MAX_DECODE_BYTES", memory)
    looking, most, lock, pause = [0], [0], Lock(), Event()

    def look(path: str, image: Image.Image) -> None:
        with lock:
            looking[0] += 1
            most[0] = max(most[0], looking[0])
        pause.wait(0.02)
        with lock:
            looking[0] -= 1

    assert find_broken_pictures(paths, threads=8, look=look) == {}
    assert 1 <= most[0] <= together
