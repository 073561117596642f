"""Read and write the pictures of the sampling scripts: PNG metadata, numbered files, the grid."""

from __future__ import annotations

import argparse
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]
"""A picture, uint8 (H, W, 3)."""


def read_picture(path: Path, flag: str, mode: str = "RGB") -> Image.Image:
    """Read a picture, upright, transparency laid on white.

    Args:
        path: the file.
        flag: the flag that named it, for messages.
        mode: ``RGB`` or ``L``.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            return picture.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "no picture that can be read"
        raise OSError(f"{flag} {path}: {reason}") from error


@dataclass(frozen=True)
class Description:
    """What a picture was made from, for its metadata.

    Attributes:
        prompt: the prompt; None for models without.
        negative_prompt: what not to show.
        seed: of this picture.
        settings: everything else, by the names that web UIs use.
    """

    prompt: str | None
    negative_prompt: str
    seed: int
    settings: Mapping[str, Any]

    def chunks(self) -> dict[str, str]:
        """Give the PNG's text chunks: ``parameters`` in the form that web UIs read, and each value by its name."""
        values = {"Steps": "", "Sampler": "", "CFG scale": "", "Seed": str(self.seed)}
        values |= {name: str(value) for name, value in self.settings.items()}
        lines = [] if self.prompt is None else [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value))
        texts = {} if self.prompt is None else {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        named = {name.lower().replace(" ", "_"): value for name, value in values.items() if value}
        return {"parameters": "\n".join(lines), **texts, **named}


def _quoted(value: str) -> str:
    """Quote a value that would be read as several."""
    return f'"{value}"' if "," in value or ":" in value else value


class PictureFolder:
    """Writes pictures to ``samples/00000.png`` and on, and grids to ``grid-0000.png`` and on.

    Counting continues what is there, and nothing is overwritten.

    Args:
        options: the flags.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.outdir: Path = options.outdir
        self.saves, self.makes_grid = not options.skip_save, not options.skip_grid
        self.columns: int = options.n_rows or options.n_samples
        self.pictures: list[Pixels] = []

    def add(self, picture: Pixels, description: Description) -> None:
        """Write one picture, and keep it for the grid.

        Raises:
            OSError: it cannot be written; then nothing of it is left.
        """
        if self.saves:
            path = write_numbered(self.outdir / "samples", "", 5, encode_png(picture, description.chunks()))
            print(path)
        if self.makes_grid:
            self.pictures.append(picture)

    def write_grid(self) -> None:
        """Write the grid of all pictures.

        Raises:
            OSError: see :meth:`add`.
        """
        if self.makes_grid and self.pictures:
            print(write_numbered(self.outdir, "grid-", 4, encode_png(lay_out(self.pictures, self.columns), {})))


def encode_png(picture: Pixels, texts: Mapping[str, str]) -> bytes:
    """Encode a picture as PNG with text chunks."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def lay_out(pictures: Sequence[Pixels], columns: int) -> Pixels:
    """Lay pictures of one size out in rows, on black with a gap of 2 pixels."""
    gap = 2
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures[0].shape[:2]
    sheet = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def write_numbered(folder: Path, prefix: str, digits: int, content: bytes) -> Path:
    """Write a PNG under the number after the highest that is there.

    Args:
        folder: made if missing.
        prefix: of the file's name.
        digits: of the number.
        content: the file's bytes.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written; then nothing of it is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matches = (re.fullmatch(rf"{re.escape(prefix)}(\d+)\.png", path.name) for path in folder.iterdir())
    number = max((int(match[1]) + 1 for match in matches if match), default=0)
    while True:
        path = folder / f"{prefix}{number:0{digits}}.png"
        try:
            file = path.open("xb")
        except FileExistsError:  # another process has just written it
            number += 1
            continue
        try:
            with file:
                file.write(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        return path
