"""Shards whose members lead elsewhere: they are labels, and nothing is written or read outside the tar."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from ldm.data.tar_index import build_index
from tests.unit.data.make_shards import picture_bytes

LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


def write(path: Path, members: list[tuple[str, bytes, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.size = len(content)
            member.linkname = "/etc/hostname"
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("stem", ["../../0", "/tmp/0", "a/../../0", "..\\..\\0"])
def test_a_name_that_leads_elsewhere_is_only_a_name(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    members = [(f"{stem}.png", tarfile.REGTYPE, picture_bytes(0)), (f"{stem}.txt", tarfile.REGTYPE, b"a cat")]
    index = build_index(str(write(tmp_path / "here" / "0.tar", members)), "stamp")
    assert len(index) + len(index.bad) <= 1
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir() == ["0.tar"]


@pytest.mark.parametrize("kind", LINKS)
def test_a_link_or_device_in_a_shard_is_no_picture(kind: bytes, tmp_path: Path) -> None:
    members = [("0.png", kind, b""), ("0.txt", tarfile.REGTYPE, b"a cat")]
    index = build_index(str(write(tmp_path / "0.tar", members)), "stamp")
    assert len(index) == 0
    assert list(index.bad.values()) == ["a caption without a picture"]
