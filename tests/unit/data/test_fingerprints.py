import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.data.fingerprints import (
    content_hash,
    difference_hashes,
    groups_of_equals,
    groups_of_lookalikes,
    same_size,
    thumbnail,
)


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def groups(*images: Image.Image) -> list[list[int]]:
    return groups_of_lookalikes(np.stack([thumbnail(image) for image in images]))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda image: as_jpeg(image, 40), id="compressed"),
        pytest.param(lambda image: image.resize((200, 150)), id="resized"),
        pytest.param(lambda image: image.resize((320, 200)), id="squashed"),
        pytest.param(lambda image: image.point(lambda value: min(255, value + 6)), id="brightened"),
        pytest.param(lambda image: image.crop((3, 2, 317, 238)), id="trimmed"),
    ],
)
def test_a_changed_copy_looks_like_its_original(changed) -> None:
    original = scene(1)
    assert groups(scene(2), original, scene(3), changed(original)) == [[1, 3]]


def test_different_pictures_look_like_none_other() -> None:
    assert groups(*(scene(seed) for seed in range(200))) == []


def test_the_same_shapes_in_other_colours_are_another_picture() -> None:
    original = scene(1)
    red, green, blue = original.split()
    assert groups(original, Image.merge("RGB", (blue, red, green))) == []


def plain(colour: str, place: int) -> Image.Image:
    image = Image.new("RGB", (512, 512), "grey")
    ImageDraw.Draw(image).ellipse((place, 200, place + 60, 260), fill=colour)
    return image


def test_in_a_plain_picture_one_small_part_tells_it_from_another() -> None:
    assert groups(plain("white", 200), plain("white", 240), plain("yellow", 200)) == []
    original = plain("white", 200)
    assert groups(original, as_jpeg(original.resize((300, 300)), 50)) == [[0, 1]]


def test_nearly_blank_pictures_are_not_compared() -> None:
    assert groups(Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")) == []


def test_a_group_may_be_large() -> None:
    base = np.asarray(thumbnail(scene(1))).astype(int)
    noise = np.random.default_rng(0).integers(-2, 3, (3000, *base.shape))
    frames = np.clip(base + noise, 0, 255).astype(np.uint8)
    assert [len(group) for group in groups_of_lookalikes(frames)] == [3000]


def test_the_frames_of_a_film_are_not_all_alike_because_neighbours_are() -> None:
    start, end = (np.asarray(thumbnail(scene(seed))).astype(float) for seed in (1, 2))
    shares = np.linspace(0, 1, 60)[:, None, None, None]
    frames = (start * (1 - shares) + end * shares).astype(np.uint8)
    found = groups_of_lookalikes(frames)
    assert len(found) > 3
    assert not any({0, 59} <= set(group) for group in found)


def test_all_of_a_group_look_like_its_first_picture_in_whatever_order_they_come() -> None:
    start, end = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3))
    shares = np.linspace(0, 1, 40)[:, None, None, None]
    frames = (start * (1 - shares) + end * shares).astype(np.uint8)
    frames = frames[np.random.default_rng(9).permutation(40)]
    found = groups_of_lookalikes(frames)
    assert len(found) > 3
    for first, *others in found:
        for other in others:
            assert groups_of_lookalikes(frames[[first, other]]) == [[0, 1]]


def test_no_and_one_picture_make_no_group() -> None:
    assert groups_of_lookalikes(np.empty((0, 16, 16, 3), np.uint8)) == []
    assert groups(scene(1)) == []


def test_a_hash_says_which_neighbour_is_brighter() -> None:
    rising = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None] * 10, (16, 16, 3))
    bits = np.unpackbits(difference_hashes(rising[None]))
    assert bits[:56].all()
    assert not bits[56:].any()


def test_files_of_equal_content_are_grouped_by_their_digests(tmp_path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert same_size({name: len(content) for name, content in contents.items()}) == ["a", "b", "c"]
    digests = {name: content_hash(str(tmp_path / name)) for name in "abc"}
    assert groups_of_equals(digests) == [["a", "c"]]
