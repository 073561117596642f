"""Lays sample pictures out on sheets that a person can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

COLUMN_TITLES: Final = {"inputs": "input"}
BACKGROUND: Final = "white"
INK: Final = "black"
SMALLEST_FONT: Final = 11
LARGEST_FONT: Final = 26
SYSTEM_FONTS: Final = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf", "Arial.ttf")
"""Fonts with accents and more scripts, by the names under which Linux, Windows and macOS have them."""


def to_pixels(images: Tensor, clamp: bool = True, rescale: bool = True) -> Tensor:
    """Convert a batch of pictures to bytes.

    Args:
        images: float (N, 3, H, W), in [-1, 1] if ``rescale``, else in [0, 1].
        clamp: cut off values outside [-1, 1] first.
        rescale: map [-1, 1] to [0, 1].

    Returns:
        uint8 (N, 3, H, W) on the CPU.
    """
    images = images.detach().float().cpu()
    if clamp:
        images = images.clamp(-1.0, 1.0)
    if rescale:
        images = (images + 1.0) / 2.0
    return (images.nan_to_num(0.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def grid(pixels: Tensor, columns: int = 4) -> Image.Image:
    """Tile pictures.

    Args:
        pixels: uint8 (N, 3, H, W).
        columns: pictures in a row.

    Returns:
        One picture.
    """
    return to_image(make_grid(pixels, nrow=min(columns, len(pixels)), padding=2, pad_value=255))


def to_image(pixels: Tensor) -> Image.Image:
    """Convert one picture's bytes.

    Args:
        pixels: uint8 (3, H, W).

    Returns:
        The picture.
    """
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def overview(columns: Mapping[str, Tensor], captions: Sequence[str] | None) -> Image.Image:
    """Set each picture's versions side by side, with its caption underneath.

    Args:
        columns: uint8 (N, 3, H, W) by kind, such as inputs, reconstruction, samples.
        captions: N texts, or None.

    Returns:
        A sheet with a row a picture and a titled column a kind, at the pictures' own size.
    """
    count = min(len(pixels) for pixels in columns.values())
    height = max(pixels.shape[2] for pixels in columns.values())
    width = max(pixels.shape[3] for pixels in columns.values())
    size = min(LARGEST_FONT, max(SMALLEST_FONT, width // 20))
    font = _load_font(size, "".join(captions or ()))
    # Small pictures leave room for whole words in their titles.
    width = max(width, *(math.ceil(font.getlength(word)) for kind in columns for word in _title(kind).split()))
    gap = max(4, size // 2)
    line_height = round(size * 1.3)
    sheet_width = len(columns) * (width + gap) + gap

    titles = [_wrap(_title(kind), width, font) for kind in columns]
    title_height = max(map(len, titles)) * line_height + gap
    texts = [_wrap(captions[row], sheet_width - 2 * gap, font) if captions else [] for row in range(count)]
    row_heights = [height + (gap // 2 + len(text) * line_height if text else 0) + 2 * gap for text in texts]

    sheet = Image.new("RGB", (sheet_width, gap + title_height + sum(row_heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        for number, line in enumerate(title):
            draw.text((gap + column * (width + gap), gap + number * line_height), line, fill=INK, font=font)
    top = gap + title_height
    for row in range(count):
        for column, pixels in enumerate(columns.values()):
            sheet.paste(to_image(pixels[row]), (gap + column * (width + gap), top))
        for number, line in enumerate(texts[row]):
            draw.text((gap, top + height + gap // 2 + number * line_height), line, fill=INK, font=font)
        top += row_heights[row]
    return sheet


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert a picture for TensorBoard.

    Args:
        image: an RGB picture.

    Returns:
        uint8 (3, H, W).
    """
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _load_font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load Pillow's own font, or one of the system's for letters that it lacks."""
    if not text.isascii():
        for name in SYSTEM_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue  # not installed here
    return ImageFont.load_default(size)


def _title(kind: str) -> str:
    """Name a column for people."""
    return COLUMN_TITLES.get(kind, kind.replace("_cfg_scale_", ", guidance ").replace("_", " "))


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text into lines that fit, between words, or inside a word that is too long for a line."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
