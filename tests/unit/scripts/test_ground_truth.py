"""Choosing ground truth from LAION's tables, fetching it, and giving pictures one caption."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ground_truth import Fetched, caption_all, main, read_outcome, unpack_shards
from PIL import Image

from ldm.data.scan import scan_data_root
from tests.unit.data.make_shards import picture_bytes, write_tar
from tests.unit.file_server import serve_files

pa = pytest.importorskip("pyarrow", reason="needs the extra ground-truth")

# Importing it takes seconds; the script does so in a process of its own.
needs_img2dataset = pytest.mark.skipif(
    importlib.util.find_spec("img2dataset") is None, reason="needs the extra ground-truth"
)

Write = Callable[..., Path]

SAFE: dict[str, Any] = {"WIDTH": 600, "HEIGHT": 600, "punsafe": 0.01, "pwatermark": 0.1, "AESTHETIC_SCORE": 5.5}


@pytest.fixture
def write_table(tmp_path: Path) -> Write:
    """Write a LAION-style table, a row for each caption or dictionary of what differs from a good row."""

    def write(*rows: str | dict[str, Any], name: str = "part-0.parquet", drop: tuple[str, ...] = ()) -> Path:
        import pyarrow.parquet as pq

        filled = []
        for number, row in enumerate(rows):
            given = {"TEXT": row} if isinstance(row, str) else row
            good = {"URL": f"http://127.0.0.1/{number}.jpg", "TEXT": "a man", **SAFE, **given}
            filled.append({key: value for key, value in good.items() if key not in drop})
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(filled), path)
        return path

    return write


def chosen(table: Path | list[Path], **params: Any) -> tuple[list[str], Any]:
    """Choose rows; gives their captions and the counts."""
    import pyarrow.parquet as pq
    from laion_table import Wanted, select

    tables = table if isinstance(table, list) else [table]
    target = tables[0].with_name("chosen.parquet")
    selection = select(tables, Wanted(**params), target)
    return pq.read_table(target).column("caption").to_pylist(), selection


@pytest.mark.parametrize(
    ("params", "captions"),
    [
        ({"all_words": ("man", "dog")}, ["A Man and his dog"]),
        ({"any_words": ("dog", "woman")}, ["A Man and his dog", "a woman", "dog-friendly café"]),
        ({"no_words": ("man",)}, ["a woman", "dog-friendly café"]),
        ({"any_words": ("man",), "substring": True}, ["A Man and his dog", "a woman"]),
        ({"any_words": ("café",)}, ["dog-friendly café"]),
        ({"any_words": ("caf",)}, []),
        ({"any_words": ("man and  his",)}, ["A Man and his dog"]),
        ({"any_words": ("m.n", "(")}, []),
    ],
)
def test_captions_are_chosen_by_words(write_table: Write, params: dict[str, Any], captions: list[str]) -> None:
    assert chosen(write_table("A Man and his dog", "a woman", "dog-friendly café"), **params)[0] == captions


@pytest.mark.parametrize(
    ("row", "params", "reason"),
    [
        ({"WIDTH": 511}, {}, "a side is under 512 pixels"),
        ({"HEIGHT": None}, {}, "a side is under 512 pixels"),
        ({"WIDTH": 3000}, {"max_aspect": 3}, "one side is over 3 times the other"),
        ({"AESTHETIC_SCORE": 4.9}, {"min_score": 5}, "score under 5"),
        ({"pwatermark": 0.9}, {"max_watermark": 0.5}, "watermark over 0.5"),
        ({"punsafe": 0.9}, {}, "probability of being unsafe over 0.1"),
        ({"punsafe": None}, {}, "its safety is not known"),
        ({"URL": "ftp://host/1.jpg"}, {}, "no http address"),
        ({"URL": None}, {}, "no http address"),
        ({"TEXT": " "}, {}, "no caption"),
        ({"TEXT": None}, {}, "no caption"),
        ({"URL": "http://127.0.0.1/0.jpg"}, {}, "the address came before"),
    ],
)
def test_a_row_that_is_not_wanted_is_counted_by_its_reason(
    write_table: Write, row: dict[str, Any], params: dict[str, Any], reason: str
) -> None:
    captions, selection = chosen(write_table("good", row), **params)
    assert captions == ["good"]
    assert +selection.left_out == Counter({reason: 1})
    assert (selection.rows, selection.kept) == (2, 1)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("UNLIKELY", None),
        ("UNSURE", "not called safe"),
        ("NSFW", "not called safe"),
        ("", "its safety is not known"),
        (None, "its safety is not known"),
    ],
)
def test_what_a_table_does_not_call_safe_is_left_out(write_table: Write, said: str | None, reason: str | None) -> None:
    table = write_table({"TEXT": "it", "NSFW": said}, {"TEXT": "sure", "NSFW": "UNLIKELY"}, drop=("punsafe",))
    captions, selection = chosen(table)
    assert captions == (["sure"] if reason else ["it", "sure"])
    assert +selection.left_out == Counter({reason: 1} if reason else {})


def test_unsafe_pictures_come_where_they_are_asked_for(write_table: Write) -> None:
    assert chosen(write_table({"punsafe": 0.9}), max_unsafe=None)[0] == ["a man"]


def test_columns_are_known_by_their_other_names(write_table: Write) -> None:
    row = {"url": "http://127.0.0.1/1", "caption": "small", "width": 600.0, "height": 600.0, "NSFW": False}
    table = write_table(row, drop=("URL", "TEXT", "WIDTH", "HEIGHT", "punsafe"))
    assert chosen(table)[0] == ["small"]


def test_all_columns_that_are_missing_are_told_at_once(write_table: Write) -> None:
    first = write_table("a", name="1.parquet", drop=("URL", "AESTHETIC_SCORE", "punsafe"))
    second = write_table("a", name="2.parquet", drop=("pwatermark",))
    with pytest.raises(ValueError) as raised:
        chosen([first, second], min_score=5.0, max_watermark=0.5)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [str(first)] * 3 + [str(second)]
    assert "--allow_unsafe takes all of them" in lines[2]


def test_a_table_without_sizes_is_noted(write_table: Write) -> None:
    assert "tell no sizes" in chosen(write_table("a", drop=("WIDTH", "HEIGHT")))[1].notes[0]


def test_a_limit_ends_the_choice(write_table: Write) -> None:
    captions, selection = chosen([write_table("1", "2", "3"), write_table("4", name="2.parquet")], limit=2)
    assert captions == ["1", "2"]
    assert (selection.rows, selection.kept, sum(selection.left_out.values())) == (3, 2, 1)


def test_a_dry_run_counts_and_writes_nothing(
    write_table: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table("a man", "a dog")
    before = sorted(tmp_path.rglob("*"))
    assert main(["fetch", str(table), "--out", str(tmp_path / "out"), "--any_words", "man", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 rows were looked at"
    assert "1 left out: the caption holds none of 'man'" in lines
    assert "1 chosen" in lines


def test_a_wrong_command_ends_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", str(tmp_path / "none.parquet"), "--out", str(tmp_path)]) == 2
    assert "there is no parquet file" in capsys.readouterr().err


@needs_img2dataset
def test_another_choice_does_not_go_on_in_the_same_folder(
    write_table: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fetch", str(write_table("a man")), "--out", str(tmp_path / "out"), "--python", "/no/python"]
    assert main(command) == 2
    assert main([*command, "--per_shard", "7"]) == 2
    assert "was begun with --per_shard 1000" in capsys.readouterr().err


def fetched_shard(folder: Path, number: int, captions: list[str], is_finished: bool = True) -> Path:
    """Write what img2dataset leaves of a shard."""
    members = {}
    for place, caption in enumerate(captions):
        key = f"{number:05d}{place:04d}"
        members |= {f"{key}.jpg": picture_bytes(place, kind="JPEG"), f"{key}.txt": caption.encode()}
    if is_finished:
        counts = {"successes": len(captions), "status_dict": {"success": len(captions), "HTTP Error 404": 1}}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}_stats.json").write_text(json.dumps(counts), encoding="utf-8")
    return write_tar(folder / f"{number:05d}.tar", members)


def test_fetched_pictures_are_named_by_their_captions(tmp_path: Path) -> None:
    target = tmp_path / "root" / "laion"
    captions = ["a man", "a man", "what is_this?", "x" * 300, ""]
    shard = fetched_shard(target / ".ground_truth" / "shards", 0, captions)
    assert unpack_shards(shard.parent, target) == (5, 2)
    scan = scan_data_root(str(tmp_path / "root"))
    assert scan.problems == []
    assert sorted(picture.caption for picture in scan.pictures) == sorted(captions)
    assert (target / "a man_000000001.jpg").read_bytes() == picture_bytes(1, kind="JPEG")
    assert not shard.exists()


def test_a_caption_may_make_a_name_as_long_as_any_can_be(tmp_path: Path) -> None:
    caption = "\N{CJK UNIFIED IDEOGRAPH-732B}" * 80
    shard = fetched_shard(tmp_path / "shards", 0, [caption])
    target = tmp_path / "out" / "cats"
    target.mkdir(parents=True)
    assert unpack_shards(shard.parent, target) == (1, 0)
    (name,) = (path.name for path in target.iterdir())
    assert 250 < len(name.encode()) <= 255


def test_a_shard_that_is_not_finished_is_left_for_the_next_time(tmp_path: Path) -> None:
    folder, target = tmp_path / "shards", tmp_path / "laion"
    target.mkdir()
    fetched_shard(folder, 0, ["a man"])
    unfinished = fetched_shard(folder, 1, ["a dog"], is_finished=False)
    assert unpack_shards(folder, target) == (1, 0)
    assert unfinished.exists()
    assert unpack_shards(folder, target) == (0, 0)
    outcome = read_outcome(folder, wanted=4, per_shard=2)
    assert outcome == Fetched(wanted=4, pictures=1, failures=Counter({"HTTP Error 404": 1}), is_complete=False)


def test_a_damaged_shard_is_named_and_kept(tmp_path: Path) -> None:
    shard = fetched_shard(tmp_path / "shards", 0, ["a man", "a dog"])
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"00000\.tar: .*cut off"):
        unpack_shards(shard.parent, tmp_path)
    assert shard.exists()


@pytest.mark.slow
@needs_img2dataset
def test_pictures_are_fetched_from_whom_allows_it(
    write_table: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_files() as server:
        for number in range(4):
            server.files[f"{number}.png"] = picture_bytes(number, 80, 64)
        server.files["4.png"] = picture_bytes(4, 80, 20)
        server.headers["3.png"] = {"X-Robots-Tag": "noai"}
        rows = [{"URL": f"{server.url}{number}.png", "TEXT": f"man {number}"} for number in range(6)]
        out = tmp_path / "root" / "laion"
        command = ["fetch", str(write_table(*rows)), "--out", str(out), "--per_shard", "10"]
        assert main([*command, "--size", "32", "--min_side", "40"]) == 0
        assert all("everydream-trainer" in agent for agent in server.agents)
        assert Counter(path for path, _ in server.requests) == {f"{number}.png": 1 for number in range(6)}
    said = capsys.readouterr().out
    assert "3 of 6 pictures were fetched" in said
    assert "disallowed by X-Robots-Tag" in said
    pictures = scan_data_root(str(tmp_path / "root")).pictures
    assert sorted(picture.caption for picture in pictures) == ["man 0", "man 1", "man 2"]
    assert {Image.open(picture.path).size for picture in pictures} == {(40, 32)}


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix == ".png")


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """FFHQ's layout, in small."""
    for name in ("00000/00000.png", "00000/00001.png", "01000/01000.PNG"):
        (tmp_path / "ffhq" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ffhq" / name).write_bytes(picture_bytes(len(name)))
    return tmp_path / "ffhq"


def test_all_pictures_of_a_folder_get_one_caption(faces: Path) -> None:
    assert caption_all(faces, "close up photo of a person")[0] == 3
    wanted = ["00000/X_00001.png", "00000/X_00002.png", "01000/X_00003.png"]
    assert names_below(faces) == [name.replace("X", "close up photo of a person") for name in wanted]


def test_pictures_that_have_the_caption_keep_their_names(faces: Path) -> None:
    caption_all(faces, "a face")
    (faces / "00000" / "new.png").write_bytes(picture_bytes(9))
    before = names_below(faces)
    assert caption_all(faces, "a face")[1] == [f"{faces / '00000' / 'new.png'} -> a face_00004.png"]
    assert len(set(names_below(faces)) - set(before)) == 1


def test_a_dry_run_renames_nothing(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names_below(faces)
    assert main(["caption", str(faces), "--text", "a face", "--dry-run"]) == 0
    assert names_below(faces) == before
    assert "3 of 3 pictures would get a new name" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [("a_face", "underscore"), ("what?", "Windows allows in no file name")])
def test_a_caption_that_no_name_can_hold_is_refused(faces: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        caption_all(faces, text)


def test_pictures_with_caption_files_are_not_renamed(faces: Path) -> None:
    (faces / "00000" / "00001.txt").write_text("own", encoding="utf-8")
    before = names_below(faces)
    with pytest.raises(ValueError, match="1 of 3 pictures have a caption file"):
        caption_all(faces, "a face")
    assert names_below(faces) == before
