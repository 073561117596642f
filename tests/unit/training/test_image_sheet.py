from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.training.image_sheet import grid, overview, to_pixels


def plain(count: int, height: int, width: int, value: int = 128) -> torch.Tensor:
    return torch.full((count, 3, height, width), value, dtype=torch.uint8)


def ink(area: np.ndarray) -> int:
    """Count dark pixels."""
    return int((area < 100).all(axis=-1).sum())


def test_pixels_span_the_whole_range() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    assert to_pixels(images)[:, 0, 0, 0].tolist() == [0, 128, 255, 255]


def test_pixels_can_be_left_unscaled() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    assert to_pixels(images, clamp=False, rescale=False)[:, 0, 0, 0].tolist() == [0, 128, 255]


def test_a_sample_that_is_not_a_number_is_still_a_picture() -> None:
    assert (
        to_pixels(torch.full((1, 3, 2, 2), float("nan"))).tolist() == to_pixels(torch.full((1, 3, 2, 2), -1.0)).tolist()
    )


def test_a_grid_has_four_columns_and_the_pictures_own_size() -> None:
    assert grid(plain(6, height=32, width=64)).size == (4 * 64 + 5 * 2, 2 * 32 + 3 * 2)


def test_a_grid_of_fewer_pictures_has_no_empty_columns() -> None:
    assert grid(plain(2, height=32, width=64)).size == (2 * 64 + 3 * 2, 32 + 2 * 2)


def test_an_overview_shows_a_row_a_picture_and_a_column_a_kind() -> None:
    reds = torch.stack([plain(1, 40, 60, 10 * number + 40)[0] for number in range(3)])
    reds[:, 1:] = 0
    sheet = np.asarray(overview({"inputs": reds, "samples": reds}, None))
    columns = sheet.shape[1] // 2
    for value in (40, 50, 60):
        is_there = (sheet == (value, 0, 0)).all(axis=-1)
        assert is_there[:, :columns].sum() == is_there[:, columns:].sum() == 40 * 60


def test_captions_are_drawn_below_their_pictures() -> None:
    pixels = plain(1, 100, 100)
    bare = np.asarray(overview({"inputs": pixels}, None))
    captioned = np.asarray(overview({"inputs": pixels}, ["a photo of a cat"]))
    assert captioned.shape[0] > bare.shape[0]
    assert ink(captioned[-20:]) > 20


@pytest.mark.parametrize("caption", ["a castle on a hill, " * 30, "withoutspaces" * 30])
def test_a_long_caption_is_wrapped_inside_the_sheet(caption: str) -> None:
    pixels = plain(1, 100, 100)
    short = overview({"inputs": pixels, "samples": pixels}, ["a cat"])
    sheet = overview({"inputs": pixels, "samples": pixels}, [caption])
    assert sheet.width == short.width
    assert sheet.height > short.height + 60
    assert ink(np.asarray(sheet)[:, -3:]) == 0


def test_titles_of_small_pictures_are_not_cut_inside_a_word() -> None:
    sheet = overview({"reconstruction": plain(1, 16, 16)}, None)
    assert sheet.width > 16 * 3


def test_an_empty_caption_is_no_error() -> None:
    assert overview({"inputs": plain(1, 64, 64)}, [""]).width > 64
