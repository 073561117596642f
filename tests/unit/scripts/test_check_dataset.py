import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from check_dataset import count_devices, main, read_settings

from ldm.data.data_module import DataModuleFromConfig
from tests.unit.scripts.planted_faults import SIZE, add_good_pictures, picture, plant

OVERRIDES = [f"data.params.{split}.params.size={SIZE}" for split in ("train", "validation")]

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the script on a folder and return its JSON, with the exit status as ``exit``."""

    def run(root: Path, *words: str) -> dict[str, Any]:
        status = main(["--data_root", str(root), "--json", *words, *OVERRIDES])
        return {**json.loads(capsys.readouterr().out), "exit": status}

    return run


def kinds(result: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one["path"], one["kind"]) for one in result["findings"]}


@pytest.fixture(scope="module")
def faulty_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[str, str]]]:
    root = tmp_path_factory.mktemp("planted") / "data"
    add_good_pictures(root, 500)
    return root, {(planted.path, planted.kind) for planted in plant(root)}


def test_every_planted_fault_among_500_good_pictures_is_found_and_nothing_else(
    faulty_root: tuple[Path, set[tuple[str, str]]], check: Check
) -> None:
    root, planted = faulty_root
    assert len({kind for _, kind in planted}) >= 20
    result = check(root, "--decode")
    assert kinds(result) == planted
    assert result["exit"] == 2


def test_without_decoding_all_is_found_that_headers_and_names_tell(
    faulty_root: tuple[Path, set[tuple[str, str]]], check: Check
) -> None:
    root, planted = faulty_root
    need_pixels = {fault for fault in planted if "half a photo" in fault[0] or fault[1] == "near_duplicate"}
    opaque = {(str(root / "new" / "an opaque bottle.png"), "transparent")}  # its header alone cannot tell
    assert kinds(check(root)) == planted - need_pixels | opaque


def test_good_pictures_are_clean(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 20)
    result = check(tmp_path / "data", "--decode")
    assert (result["exit"], result["status"], result["findings"]) == (0, 0, [])


def test_warnings_alone_exit_with_1(tmp_path: Path, check: Check) -> None:
    (path,) = add_good_pictures(tmp_path / "data", 1)
    shutil.copy(path, tmp_path / "data" / "man_laion" / "a copy.jpg")
    assert check(tmp_path / "data", "data.params.batch_size=1")["exit"] == 1


def test_notes_alone_exit_with_0(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 2)
    for number in (1, 2):
        picture(100 + number).save(tmp_path / "data" / "man" / f"a man_({number}).png")
    result = check(tmp_path / "data")
    assert {one["severity"] for one in result["findings"]} == {"note"}
    assert result["exit"] == 0


def test_an_unreadable_folder_is_an_error(tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    add_good_pictures(tmp_path / "data", 2)
    locked = tmp_path / "data" / "locked"
    locked.mkdir()
    real_scandir = os.scandir

    def scandir(path: Any) -> Any:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert (str(locked), "unreadable_folder") in kinds(check(tmp_path / "data"))


def training_steps(root: Path, words: list[str]) -> list[int]:
    """Count the steps of the first two epochs as the trainer's own data module does."""
    config, settings = read_settings(["--data_root", str(root), *words, *OVERRIDES])
    module = DataModuleFromConfig(**config["data"]["params"])
    module.setup()
    return [module.steps_per_epoch("train", settings.devices, epoch) for epoch in range(2)]


@pytest.mark.parametrize("mode", ["bucket", "squash"])
def test_the_steps_are_those_of_training(tmp_path: Path, check: Check, mode: str) -> None:
    add_good_pictures(tmp_path / "data", 23)
    (tmp_path / "data" / "man" / "multiply.txt").write_text("0.5", encoding="utf-8")
    words = [f"data.params.train.params.resize_mode={mode}", "data.params.train.params.repeats=3"]
    steps = check(tmp_path / "data", *words)["figures"]["steps"]["training"]
    assert steps[:2] == training_steps(tmp_path / "data", words)


def test_broken_pictures_that_are_skipped_count_no_steps(tmp_path: Path, check: Check) -> None:
    paths = add_good_pictures(tmp_path / "data", 12)
    damaged = Path(paths[0])  # a JPEG whose header is sound
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size * 3 // 4])
    words = ["data.params.train.params.on_bad_image=skip", "data.params.validation.params.on_bad_image=skip"]
    words += ["data.params.batch_size=1"]
    figures = check(tmp_path / "data", "--decode", *words)["figures"]
    assert figures["steps"]["training"] == [11 * 20]
    assert sum(row["pictures"] for row in figures["buckets"]) == 11
    assert training_steps(tmp_path / "data", words) == [11 * 20, 11 * 20]


def test_a_batch_larger_than_an_epoch_is_an_error_as_it_is_in_training(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 2)
    result = check(tmp_path / "data", "data.params.batch_size=99")
    assert kinds(result) == {(str(tmp_path / "data"), "refused")}
    with pytest.raises(ValueError, match="larger than the training set"):
        training_steps(tmp_path / "data", ["data.params.batch_size=99"])


def test_the_training_command_can_be_given_as_it_is(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 24)
    words = ["-t", "-n", "name", "--gpus", "0,1", "--limit_train_batches", "3", "data.params.batch_size=2"]
    result = check(tmp_path / "data", *words)
    assert (result["settings"]["devices"], result["figures"]["steps"]["training"]) == (2, [3])


def test_a_run_that_overfits_takes_only_those_batches(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 24)
    steps = check(tmp_path / "data", "--overfit_batches", "2", "--max_epochs", "3")["figures"]["steps"]
    assert (steps["training"], steps["total"]) == ([2], 6)


def test_a_limit_that_leaves_nothing_to_train_on_is_an_error_as_it_is_in_training(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 24)
    result = check(tmp_path / "data", "--limit_train_batches", "0.0001")
    assert (kinds(result), result["status"]) == ({(str(tmp_path / "data"), "refused")}, 2)


@pytest.mark.parametrize("name", ["everydream", "micro", "tiny"])
def test_every_shipped_yaml_can_be_checked_for(tmp_path: Path, project_root: Path, name: str) -> None:
    base = project_root / "configs" / "stable-diffusion" / f"v1-finetune_{name}.yaml"
    _, settings = read_settings(["--base", str(base), "--data_root", str(tmp_path)])
    assert (settings.data_root, settings.resize_mode, settings.assumed) == (str(tmp_path), "bucket", False)


def test_pictures_may_keep_their_own_sizes(tmp_path: Path) -> None:
    add_good_pictures(tmp_path / "data", 10)
    words = [f"data.params.{split}.params.size=null" for split in ("train", "validation")]
    status = main(["--data_root", str(tmp_path / "data"), "--json", str(tmp_path / "check.json"), *words])
    result = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert (status, {tuple(row["size"]) for row in result["figures"]["buckets"]}) == (
        0,
        {(96, 80), (64, 64), (160, 80), (70, 130), (200, 150)},
    )


@pytest.mark.parametrize("flag", ["--html", "--json"])
def test_a_file_that_cannot_be_written_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    missing = tmp_path / "missing" / "file"
    assert main(["--data_root", "no/such/folder", flag, str(missing)]) == 2
    assert capsys.readouterr().err.startswith(f"check_dataset: {missing} cannot be written")


@pytest.mark.parametrize(("devices", "count"), [(1, 1), ([0, 1], 2), ("0,1,", 2), ("3", 3), ("auto", 1), (-1, 1)])
def test_devices_are_counted_in_all_spellings(devices: Any, count: int) -> None:
    assert count_devices({"devices": devices}) == count


def test_what_the_validation_folder_is_refused_for_is_found_too(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 10)
    add_good_pictures(tmp_path / "held back", 2)
    stray = tmp_path / "held back" / "stray.png"
    picture(1).save(stray)
    result = check(tmp_path / "data", f"data.params.validation.params.data_root={tmp_path / 'held back'}")
    assert kinds(result) == {(str(stray), "in_root")}


def test_a_deeper_tree_is_checked_where_training_reads_one(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data" / "project", 10)
    words = [f"data.params.{split}.params.recursive=true" for split in ("train", "validation")]
    result = check(tmp_path / "data", *words)
    assert (result["exit"], [row["folder"] for row in result["figures"]["folders"]]) == (
        0,
        ["project/man", "project/man_laion"],
    )


def test_in_a_mixture_its_folder_is_checked_and_the_steps_are_the_mixtures(
    tmp_path: Path, check: Check, project_root: Path
) -> None:
    add_good_pictures(tmp_path / "data", 10)
    add_good_pictures(tmp_path / "more", 30)
    overlay = tmp_path / "mix.yaml"
    overlay.write_text(
        f"""
data:
  params:
    train:
      target: ldm.data.mixture.Mixture
      params:
        ratio: "new 1 : old 2"
        sets:
          new: {{target: ldm.data.every_dream.EveryDreamBatch}}
          old: {{target: ldm.data.every_dream.EveryDreamBatch, params: {{data_root: {tmp_path / "more"}}}}}
""",
        encoding="utf-8",
    )
    base = project_root / "configs" / "stable-diffusion" / "v1-finetune_everydream.yaml"
    words = ["--base", str(base), str(overlay), "data.params.train.params.repeats=1", "data.params.batch_size=1"]
    result = check(tmp_path / "data", *words)
    assert (result["figures"]["pictures"], result["figures"]["steps"]["training"]) == (10, [30])


def test_folders_are_balanced_against_ground_truth(tmp_path: Path, check: Check) -> None:
    add_good_pictures(tmp_path / "data", 40)
    (tmp_path / "data" / "man_laion" / "multiply.txt").write_text("1.5", encoding="utf-8")
    figures = check(tmp_path / "data")["figures"]
    assert figures["balance"] == {"new": 400.0, "ground_truth": 600.0}
    assert [(row["folder"], row["pictures"], row["share"]) for row in figures["folders"]] == [
        ("man", 20, 0.4),
        ("man_laion", 20, 0.6),
    ]


def test_each_picture_comes_with_what_training_makes_of_it(tmp_path: Path, check: Check) -> None:
    (tmp_path / "data" / "man").mkdir(parents=True)
    picture(1, 200, 100).save(tmp_path / "data" / "man" / "a dahlia.png")
    words = ["data.params.train.params.resize_mode=center_crop", "data.params.batch_size=1"]
    (record,) = check(tmp_path / "data", *words)["pictures"]
    assert (record["trained_size"], record["cropped"], record["tokens"]) == ([SIZE, SIZE], 0.5, 2)
    assert record["box"] == [50, 0, 150, 100]


def test_the_words_that_are_cut_are_named(tmp_path: Path, check: Check) -> None:
    (path,) = add_good_pictures(tmp_path / "data", 1)
    Path(path).with_suffix(".txt").write_text("cat " * 75 + "on a mat", encoding="utf-8")
    (found,) = check(tmp_path / "data", "data.params.batch_size=1")["findings"]
    assert found["reason"] == "loses 'on a mat'"


# --- the page -----------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Gathers every address in a page, its tags and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(root: Path, page: Path, *words: str) -> Links:
    main(["--data_root", str(root), "--html", str(page), *words, *OVERRIDES])
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_the_page_needs_no_other_file(faulty_root: tuple[Path, set[tuple[str, str]]], tmp_path: Path) -> None:
    links = read_page(faulty_root[0], tmp_path / "page.html", "--decode")
    assert len(links.addresses) > 20
    assert all(address.startswith("data:image/jpeg;base64,") for address in links.addresses)
    assert not links.tags & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_names_every_planted_fault(faulty_root: tuple[Path, set[tuple[str, str]]], tmp_path: Path) -> None:
    text = read_page(faulty_root[0], tmp_path / "page.html", "--decode").text
    assert [path for path, _ in faulty_root[1] if os.path.relpath(path, faulty_root[0]) not in text] == []


@pytest.mark.skipif(sys.platform == "win32", reason="such names cannot exist there")
def test_hostile_names_and_captions_are_only_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data" / "<img src=x onerror=alert(1)>"
    folder.mkdir(parents=True)
    names = [
        "<script>alert(1)<:script>_1.png",
        '" onmouseover="alert(1)_2.png',
        "red \x1b[31m and\nnext line_3.png",
        "turned \u202egnp_4.png",
        "${body} $title %s {0}_5.png",
    ]
    for number, name in enumerate(names):
        picture(number).save(folder / name)
    (folder / names[0]).with_suffix(".txt").write_text("</style><script>alert(2)</script>", encoding="utf-8")
    os.mkdir(os.path.join(os.fsencode(tmp_path / "data"), b"caf\xe9"))
    links = read_page(tmp_path / "data", tmp_path / "page.html", "--all")
    printed = capsys.readouterr().out
    assert "script" not in links.tags
    assert "alert ( 2" in links.text
    assert "${body} $title %s {0}" in links.text
    assert "\x1b" not in printed + links.text
    assert "\u202e" not in printed + links.text
    assert "caf\\xe9" in printed
    assert "red \\x1b[31m and\\nnext line" in links.text


# --- the terminal -------------------------------------------------------------------------------------------------


def test_a_pipe_gets_neither_bars_nor_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_good_pictures(tmp_path / "data", 10)
    (tmp_path / "data" / "man" / "nothing.png").touch()
    assert main(["--data_root", str(tmp_path / "data"), "--decode", *OVERRIDES]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not re.search("[\x1b\r]", captured.out)


def test_long_lists_are_cut_unless_all_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_good_pictures(tmp_path / "data", 4)
    for number in range(30):
        (tmp_path / "data" / "man" / f"nothing {number:02}.png").touch()
    main(["--data_root", str(tmp_path / "data"), *OVERRIDES])
    short = capsys.readouterr().out
    main(["--data_root", str(tmp_path / "data"), "--all", *OVERRIDES])
    assert "... and 10 more (--all shows them)" in short
    assert short.count("man/nothing") == 20
    assert capsys.readouterr().out.count("man/nothing") == 30


def test_a_missing_folder_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data_root", "no/such/folder"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("check_dataset: data_root 'no/such/folder' does not exist")
    assert error.count("\n") == 1


def test_a_mistyped_flag_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data_root", "x", "--decod"]) == 2
    assert "unknown flag --decod" in capsys.readouterr().err


def test_json_goes_to_a_file_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_good_pictures(tmp_path / "data", 10)
    main(["--data_root", str(tmp_path / "data"), "--json", str(tmp_path / "check.json"), *OVERRIDES])
    assert json.loads((tmp_path / "check.json").read_text())["figures"]["pictures"] == 10
    assert "steps an epoch" in capsys.readouterr().out
