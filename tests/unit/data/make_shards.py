"""Tar shards of small pictures, laid out as img2dataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture_bytes(number: int, width: int = 12, height: int = 12, kind: str = "PNG") -> bytes:
    """A picture whose first pixel tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[0, 0] = (number % 256, number // 256, 7)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind)
    return written.getvalue()


def sample(number: int, width: int = 12, height: int = 12) -> dict[str, bytes]:
    """The members of one sound sample."""
    key = f"{number:09d}"
    return {
        f"{key}.png": picture_bytes(number, width, height),
        f"{key}.txt": f"caption {number}".encode(),
        f"{key}.json": json.dumps({"caption": "of the json", "key": key}).encode(),
    }


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: list[int], sizes: tuple[tuple[int, int], ...] = ((12, 12),)) -> Path:
    """Write 00000.tar, 00001.tar, ... with so many samples each; numbers go on from shard to shard."""
    number = 0
    for shard, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for _ in range(count):
            members |= sample(number, *sizes[number % len(sizes)])
            number += 1
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 999, "successes": 999}))
    return folder
