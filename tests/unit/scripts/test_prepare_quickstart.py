from __future__ import annotations

from collections import Counter
from pathlib import Path

import prepare_quickstart
import pytest
from PIL import Image
from prepare_quickstart import PHOTOGRAPHS, Photograph, write_photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    write_photographs(folder)
    return folder


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_at_least_twelve_pictures_lie_in_at_least_two_subfolders(folder: Path) -> None:
    written = pictures(folder)
    assert len(written) == len(PHOTOGRAPHS) >= 12
    assert len({path.parent for path in written}) >= 2
    assert {path.parent.parent for path in written} == {folder}


def test_each_ending_holds_its_own_format(folder: Path) -> None:
    formats = set()
    for path in pictures(folder):
        with Image.open(path) as picture:
            picture.load()
            formats.add((path.suffix, picture.format))
    assert formats == {(".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP")}


def test_landscape_portrait_and_square_are_there(folder: Path) -> None:
    shapes = Counter()
    for path in pictures(folder):
        with Image.open(path) as picture:
            width, height = picture.size
        shapes["square" if width == height else "landscape" if width > height else "portrait"] += 1
    assert min(shapes["square"], shapes["landscape"], shapes["portrait"]) >= 2


def test_some_captions_have_a_pair_of_pictures() -> None:
    names = {Path(photograph.target).stem for photograph in PHOTOGRAPHS}
    assert any(f"{name.removesuffix('_(1)')}_(2)" in names for name in names if name.endswith("_(1)"))


def test_names_are_captions_that_every_file_system_takes() -> None:
    for photograph in PHOTOGRAPHS:
        name = Path(photograph.target).name
        caption = Path(name).stem.partition("_")[0]
        assert len(caption.split()) >= 5
        assert not set(name) & set('<>:"/\\|?*')
        assert len(name) < 150


def test_a_second_run_writes_nothing(folder: Path) -> None:
    assert write_photographs(folder) == 0


def test_a_file_cut_short_is_written_again(folder: Path) -> None:
    path = pictures(folder)[0]
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert write_photographs(folder) == 1
    assert path.read_bytes() == content


def test_a_crop_is_cut_from_its_photograph(tmp_path: Path) -> None:
    photograph = Photograph(prepare_quickstart.SKIMAGE, "astronaut.png", "one/a crop.png", crop=(10, 20, 110, 70))
    write_photographs(tmp_path, [photograph])
    source = prepare_quickstart.package_folder(photograph.package)
    assert source is not None
    with Image.open(source / "astronaut.png") as whole, Image.open(tmp_path / photograph.target) as cut:
        assert cut.size == (100, 50)
        assert cut.getpixel((0, 0)) == whole.getpixel((10, 20))


def test_all_missing_photographs_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    wanted = [
        PHOTOGRAPHS[0],
        Photograph(prepare_quickstart.SKIMAGE, "no_such.png", "one/a.png"),
        Photograph(("no_such_package", "data"), "other.png", "one/b.png"),
    ]
    with pytest.raises(FileNotFoundError, match=r"no_such\.png \(skimage\), other\.png \(no_such_package\)"):
        write_photographs(tmp_path, wanted)
    assert pictures(tmp_path) == []
