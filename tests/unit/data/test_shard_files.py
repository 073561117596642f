"""Which shards a config names, and how those at URLs come to this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm.data import shard_files
from ldm.data.shard_files import GIB, ShardFiles, expand_braces, expand_shards, shard_names
from tests.unit.data.make_shards import write_shards
from tests.unit.file_server import FileServer, serve_files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Serves 00000.tar to 00002.tar, of 2, 3 and 4 samples."""
    folder = write_shards(tmp_path / "served", [2, 3, 4])
    with serve_files() as state:
        for path in folder.glob("*.tar"):
            state.files[path.name] = path.read_bytes()
        yield state


def files_at(server: FileServer, tmp_path: Path, cache_gib: float = 1.0) -> ShardFiles:
    return ShardFiles(
        expand_shards(server.url + "{00000..00002}.tar"), str(tmp_path / "cache"), cache_gib, pause_seconds=0.001
    )


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a/{00009..00011}.tar", ["a/00009.tar", "a/00010.tar", "a/00011.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_written_out(pattern: str, expanded: list[str]) -> None:
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{abc}.tar"])
def test_braces_of_another_kind_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\{"):
        expand_braces(pattern)


def test_a_folder_a_pattern_and_braces_name_the_same_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "laion", [1, 1, 1])
    wanted = [str(folder / f"{number:05d}.tar") for number in range(3)]
    assert expand_shards(str(folder)) == wanted
    assert expand_shards(str(folder / "*.tar")) == wanted
    assert expand_shards([str(folder / "{00000..00001}.tar"), wanted[2]]) == wanted


def test_everything_that_is_wrong_with_the_names_is_told_at_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "laion", [1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as raised:
        expand_shards([str(folder), str(folder), str(tmp_path / "empty"), str(tmp_path / "{1..3}.tar"), "s3://b/1.tar"])
    lines = str(raised.value).splitlines()
    assert len(lines) == 4
    assert "holds no .tar files" in lines[0]
    assert "1.tar does not exist (and 2 more" in lines[1]
    assert "no http or https URL" in lines[2]
    assert "is named twice" in lines[3]


def test_shards_are_named_by_as_many_folders_as_tell_them_apart() -> None:
    assert shard_names(["/a/laion/0.tar", "https://host/x/other/0.tar?key=1"]) == ["laion/0.tar", "other/0.tar"]
    assert shard_names(["/a/laion/0.tar", "/b/laion/0.tar"]) == ["a/laion/0.tar", "b/laion/0.tar"]


def test_a_url_is_fetched_once(server: FileServer, tmp_path: Path) -> None:
    files = files_at(server, tmp_path)
    first = files.local_path(1)
    assert Path(first).read_bytes() == server.files["00001.tar"]
    assert files.local_path(1) == files_at(server, tmp_path).local_path(1) == first
    assert [path for path, _ in server.requests] == ["00001.tar"]


def test_a_dropped_connection_goes_on_where_it_broke(server: FileServer, tmp_path: Path) -> None:
    server.files["00001.tar"] = bytes(range(256)) * 1000
    server.drop_after["00001.tar"] = [100_000, 70_000]
    path = files_at(server, tmp_path).local_path(1)
    assert Path(path).read_bytes() == server.files["00001.tar"]
    assert [asked for _, asked in server.requests] == [None, "bytes=65536-", "bytes=131072-"]


def test_what_was_fetched_before_is_used_by_the_next_run(server: FileServer, tmp_path: Path) -> None:
    server.files["00001.tar"] = bytes(range(256)) * 1000
    server.drop_after["00001.tar"] = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError, match=rf"{server.url}00001.tar: cannot be fetched"):
        files_at(server, tmp_path).local_path(1)
    server.requests.clear()
    path = files_at(server, tmp_path).local_path(1)
    assert Path(path).read_bytes() == server.files["00001.tar"]
    assert server.requests == [("00001.tar", "bytes=65536-")]


def test_a_file_that_changed_between_two_attempts_is_fetched_anew(server: FileServer, tmp_path: Path) -> None:
    server.files["00001.tar"] = bytes(range(256)) * 1000
    server.drop_after["00001.tar"] = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError, match="cannot be fetched"):
        files_at(server, tmp_path).local_path(1)
    server.files["00001.tar"] = bytes(1000)
    assert Path(files_at(server, tmp_path).local_path(1)).read_bytes() == bytes(1000)


def test_a_busy_server_is_asked_again(server: FileServer, tmp_path: Path) -> None:
    server.statuses["00000.tar"] = [503, 429]
    assert Path(files_at(server, tmp_path).local_path(0)).read_bytes() == server.files["00000.tar"]


def test_a_missing_file_is_told_with_its_url_and_not_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    del server.files["00001.tar"]
    del server.files["00002.tar"]
    with pytest.raises(OSError) as raised:
        files_at(server, tmp_path).indices([0, 1, 2])
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{server.url}00001.tar", f"{server.url}00002.tar"]
    assert len(server.requests) == 3


def test_the_longest_unused_copies_make_room(server: FileServer, tmp_path: Path) -> None:
    room = len(server.files["00000.tar"]) + len(server.files["00002.tar"])
    files = files_at(server, tmp_path, cache_gib=(room + 10) / GIB)
    first, second = files.local_path(0), files.local_path(1)
    os.utime(second, (1, 1))
    third = files.local_path(2)
    assert [os.path.exists(path) for path in (first, second, third)] == [True, False, True]


def test_shards_of_ones_own_do_not_make_room(server: FileServer, tmp_path: Path) -> None:
    own = tmp_path / "cache" / "shards" / "00007.tar"
    own.parent.mkdir(parents=True)
    own.write_bytes(bytes(1 << 20))
    os.utime(own, (1, 1))
    files_at(server, tmp_path, cache_gib=(len(server.files["00000.tar"]) + 10) / GIB).local_path(0)
    assert own.exists()


def test_a_shard_larger_than_all_room_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"more than shard_cache_gib"):
        files_at(server, tmp_path, cache_gib=100 / GIB).local_path(0)


def test_an_index_outlives_its_copy(server: FileServer, tmp_path: Path) -> None:
    files = files_at(server, tmp_path)
    assert len(files.index(1)) == 3
    os.remove(files.local_path(1))
    server.requests.clear()
    assert len(files_at(server, tmp_path).index(1)) == 3
    assert server.requests == []


def test_a_url_whose_file_changed_since_it_was_indexed_is_told(server: FileServer, tmp_path: Path) -> None:
    files = files_at(server, tmp_path)
    index = files.index(1)
    os.remove(files.local_path(1))
    server.files["00001.tar"] = server.files["00002.tar"]
    with pytest.raises(OSError, match="has changed since its index was built"):
        files.check_state(1, index, files.local_path(1))


def test_a_local_tar_is_indexed_again_when_it_changed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "laion", [2])
    files = ShardFiles(expand_shards(str(folder)), str(tmp_path / "cache"), 1.0)
    assert len(files.index(0)) == 2
    write_shards(tmp_path / "laion", [5])
    assert len(files.index(0)) == 5


def test_a_local_tar_is_read_once_for_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ShardFiles(expand_shards(str(write_shards(tmp_path / "laion", [2]))), str(tmp_path / "cache"), 1.0)
    files.index(0)
    monkeypatch.delattr(shard_files, "build_index")
    assert len(files.index(0)) == 2


def test_a_copy_that_is_in_use_is_not_removed(server: FileServer, tmp_path: Path) -> None:
    files = files_at(server, tmp_path, cache_gib=(len(server.files["00002.tar"]) + 10) / GIB)
    with files.in_use(0) as first:
        files.local_path(1)
        assert os.path.exists(first)
    files.local_path(2)
    assert not os.path.exists(first)


def test_shards_are_indexed_beside_each_other_also_where_there_is_room_for_one(
    server: FileServer, tmp_path: Path
) -> None:
    files = files_at(server, tmp_path, cache_gib=(len(server.files["00002.tar"]) + 10) / GIB)
    assert [len(index) for index in files.indices([0, 1, 2])] == [2, 3, 4]


def test_several_processes_build_one_index(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "laion", [4] * 6)
    with ThreadPoolExecutor(4) as pool:
        sets = [ShardFiles(expand_shards(str(folder)), str(tmp_path / "cache"), 1.0) for _ in range(4)]
        found = list(pool.map(lambda files: [len(index) for index in files.indices(range(6))], sets))
    assert found == [[4] * 6] * 4
    assert len(list((tmp_path / "cache" / "indices").glob("*.npz"))) == 6


def test_what_follows_a_urls_path_is_told_to_its_server_alone(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.statuses["00001.tar?key=secret"] = [503, 403]
    files = ShardFiles([server.url + "00001.tar?key=secret"], str(tmp_path / "cache"), 1.0, pause_seconds=0.001)
    with pytest.raises(OSError, match=r"00001\.tar: cannot be fetched: the server answers 403 Forbidden") as raised:
        files.local_path(0)
    assert "secret" not in f"{raised.value} {caplog.text} {list(tmp_path.rglob('*'))}"
    assert "the server answers 503" in caplog.text


def test_a_copy_that_is_damaged_is_fetched_once_more(server: FileServer, tmp_path: Path) -> None:
    whole = server.files["00001.tar"]
    server.then["00001.tar"] = [whole]
    server.files["00001.tar"] = whole[:2000]
    index = files_at(server, tmp_path).index(1)
    assert (len(index), index.damage) == (3, "")


@pytest.mark.parametrize("stated", ["many", "-5", "9" * 5000])
def test_a_length_that_is_no_number_is_told_with_its_url(server: FileServer, tmp_path: Path, stated: str) -> None:
    server.headers["00001.tar"] = {"Content-Length": stated}
    with pytest.raises(OSError, match=r"00001\.tar: cannot be fetched: it states a length of"):
        files_at(server, tmp_path).local_path(1)


def test_an_answer_without_length_ends_where_there_is_no_more_room(server: FileServer, tmp_path: Path) -> None:
    server.files["00001.tar"] = bytes(1 << 20)
    server.headers["00001.tar"] = {"Content-Length": "", "Connection": "close"}
    with pytest.raises(OSError, match=r"00001\.tar: its .* GiB are more than shard_cache_gib"):
        files_at(server, tmp_path, cache_gib=(1 << 18) / (1 << 30)).local_path(1)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.part")) < 1 << 19


def test_another_part_than_was_asked_for_is_not_put_behind_the_first(server: FileServer, tmp_path: Path) -> None:
    server.files["00001.tar"] = bytes(200_000)
    server.drop_after["00001.tar"] = [100_000]
    server.headers["00001.tar"] = {"Content-Range": "bytes 0-99/100"}
    with pytest.raises(OSError, match=r"asked for bytes from \d+, got bytes 0-99/100"):
        files_at(server, tmp_path).local_path(1)
