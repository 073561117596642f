import logging
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ldm.data import every_dream
from ldm.data.data_module import bytes_to_unit_range
from ldm.data.ed_validate import EDValidateBatch
from ldm.data.every_dream import EveryDreamBatch, check_pictures
from ldm.data.exposure_set import Filler
from ldm.data.personalized import PersonalizedBase
from ldm.data.personalized_batch import PersonalizeBatchBase
from ldm.exposure import item_id

MakeRoot = Callable[..., Path]
NAMES = ("man/a man_(1).png", "man/a man_(2).png", "cat/a cat.webp")


@pytest.fixture
def root(make_root: MakeRoot) -> str:
    return str(make_root(*NAMES))


def read_all(dataset: EveryDreamBatch, epoch: int = 0) -> list[dict[str, Any]]:
    return [dataset[epoch * len(dataset) + position] for position in range(len(dataset))]


@pytest.mark.parametrize(("kind", "length"), [("train", 30), ("val", 3), ("validation", 3), ("test", 3)])
def test_repeats_count_for_the_training_set_alone(root: str, kind: str, length: int) -> None:
    assert len(EveryDreamBatch(root, size=8, set=kind, repeats=10)) == length


def test_an_item_has_picture_caption_exposure_and_path(root: str) -> None:
    item = EveryDreamBatch(root, size=16, repeats=2, seed=5)[4]
    assert item["image"].shape == (16, 16, 3)
    assert item["image"].dtype == np.float32
    assert item["caption"] == "a man"
    assert item["exposure"].tolist() == [5, 0, item_id("man/a man_(1).png"), 1]
    assert Path(item["path"]) == Path(root) / "man" / "a man_(1).png"


def test_default_collation_gives_the_documented_batch(root: str) -> None:
    dataset = EveryDreamBatch(root, size=8, repeats=1)
    batch = default_collate([dataset[0], dataset[1]])
    assert (tuple(batch["image"].shape), str(batch["image"].dtype)) == ((2, 8, 8, 3), "torch.float32")
    assert batch["caption"] == ["a cat", "a man"]
    assert (tuple(batch["exposure"].shape), str(batch["exposure"].dtype)) == ((2, 4), "torch.int64")


def test_indices_beyond_the_length_are_later_epochs(root: str) -> None:
    dataset = EveryDreamBatch(root, size=8, repeats=2, seed=5)
    first, later = dataset[3], dataset[3 + 7 * len(dataset)]
    assert later["exposure"].tolist() == [5, 7, *first["exposure"].tolist()[2:]]
    assert later["path"] == first["path"]


def test_every_picture_is_shown_repeats_times_in_an_epoch(root: str) -> None:
    shown = [tuple(item["exposure"].tolist()[2:]) for item in read_all(EveryDreamBatch(root, size=8, repeats=3))]
    assert sorted(shown) == sorted((item_id(name), repeat) for name in NAMES for repeat in range(3))


def test_a_flip_happens_about_as_often_as_asked_and_always_alike(root: str) -> None:
    plain = {item["path"]: item["image"] for item in read_all(EveryDreamBatch(root, size=8, repeats=1))}
    dataset = EveryDreamBatch(root, size=8, repeats=100, flip_p=0.3)

    def flips(epoch: int) -> list[bool]:
        return [bool((item["image"] != plain[item["path"]]).any()) for item in read_all(dataset, epoch)]

    first = flips(0)
    assert 0.2 < np.mean(first) < 0.4
    assert flips(0) == first
    assert flips(1) != first


def test_a_flipped_picture_is_mirrored(root: str) -> None:
    plain, flipped = (EveryDreamBatch(root, size=8, flip_p=p)[0]["image"] for p in (0.0, 1.0))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_a_dropped_caption_is_the_empty_prompt(root: str) -> None:
    captions = [
        item["caption"] for item in read_all(EveryDreamBatch(root, size=8, repeats=100, conditional_dropout=0.3))
    ]
    assert set(captions) == {"", "a man", "a cat"}
    assert 0.2 < captions.count("") / len(captions) < 0.4


def test_flips_and_dropped_captions_are_drawn_independently(root: str) -> None:
    dropping = EveryDreamBatch(root, size=8, repeats=100, conditional_dropout=0.5, flip_p=0.5)
    plain = {item["path"]: item["image"] for item in read_all(EveryDreamBatch(root, size=8, repeats=1))}
    items = read_all(dropping)
    same = [(item["caption"] == "") == bool((item["image"] != plain[item["path"]]).any()) for item in items]
    assert 0.4 < np.mean(same) < 0.6


def test_outside_training_nothing_is_drawn_and_every_epoch_is_the_same(root: str) -> None:
    dataset = EveryDreamBatch(root, size=8, set="val", flip_p=1.0, conditional_dropout=1.0, seed=99)
    reference = EveryDreamBatch(root, size=8, repeats=1)
    for item, later, plain in zip(read_all(dataset), read_all(dataset, 3), read_all(reference), strict=True):
        assert item["exposure"].tolist() == later["exposure"].tolist() == [0, 0, plain["exposure"][2], 0]
        assert item["caption"] == plain["caption"] != ""
        np.testing.assert_array_equal(item["image"], plain["image"])


def test_the_validation_set_has_each_picture_once_whatever_repeats_says(root: str) -> None:
    dataset = EDValidateBatch(root, size=8, repeats=0.2)
    assert [item["caption"] for item in read_all(dataset)] == ["a cat", "a man", "a man"]


def test_the_validation_set_is_keyed_by_the_picture_alone(root: str) -> None:
    exposures = [EDValidateBatch(root, size=8, set=kind, seed=seed)[4]["exposure"].tolist()
                 for kind, seed in (("train", 1), ("val", 2))]  # fmt: skip
    assert exposures == [[0, 0, item_id("man/a man_(1).png"), 0]] * 2


def test_older_targets_are_the_same_classes() -> None:
    assert PersonalizedBase is EDValidateBatch
    assert PersonalizeBatchBase is EveryDreamBatch


def test_center_crop_takes_the_middle(tmp_path: Path) -> None:
    (tmp_path / "r" / "a").mkdir(parents=True)
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "r" / "a" / "wide.png")
    cropped = EveryDreamBatch(str(tmp_path / "r"), size=8, center_crop=True)[0]["image"]
    squashed = EveryDreamBatch(str(tmp_path / "r"), size=8, resize_mode="squash")[0]["image"]
    assert cropped.min() == 1.0
    assert squashed.min() == -1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, "size 100 is not allowed; give a multiple of 8"),
        ({"size": 0}, "size 0 is not allowed"),
        ({"flip_p": 1.5}, "flip_p 1.5 is not allowed; give a probability from 0 to 1"),
        ({"conditional_dropout": -0.1}, "conditional_dropout -0.1 is not allowed"),
        ({"repeats": 0}, "repeats 0 is not allowed; give a whole number of at least 1"),
        ({"repeats": 0.5}, "repeats 0.5 is not allowed"),
        ({"interpolation": "nearest"}, "interpolation 'nearest' is unknown"),
        ({"set": "trian"}, "set 'trian' is unknown; choose one of train, val, validation, test"),
        ({"on_bad_image": "ignore"}, "on_bad_image 'ignore' is unknown; choose one of error, skip"),
        ({"crop": "middle"}, "crop 'middle' is unknown; choose one of center, random, jitter"),
        ({"keep_tags": -1}, "keep_tags -1 is not allowed"),
        (
            {"crop": "jitter", "resize_mode": "squash"},
            "crop 'jitter' has no effect with resize_mode 'squash'; write resize_mode: bucket",
        ),
    ],
)
def test_an_argument_out_of_range_is_named_with_what_is_allowed(
    root: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"EveryDreamBatch: {message}"):
        EveryDreamBatch(root, **arguments)


def test_all_arguments_out_of_range_are_named_at_once(root: str) -> None:
    with pytest.raises(ValueError, match=r"size 100(.|\n)*repeats 0(.|\n)*flip_p 2"):
        EveryDreamBatch(root, size=100, repeats=0, flip_p=2)


def test_misplaced_and_broken_pictures_are_one_error(make_root: MakeRoot) -> None:
    root = make_root("a/good.png", "stray.png", "a/b/deep.png")
    (root / "a" / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        EveryDreamBatch(str(root))
    lines = str(caught.value).splitlines()
    assert [any(name in line for line in lines) for name in ("stray.png", "deep.png", "bad.png")] == [True] * 3


def test_the_check_names_all_broken_pictures_and_the_key_that_skips_them(make_root: MakeRoot) -> None:
    root = make_root("a/good.png")
    for name in ("one.png", "two.jpg"):
        (root / "a" / name).write_bytes(b"no picture")
    dataset = EveryDreamBatch(str(root), size=8)
    with pytest.raises(ValueError) as caught:
        check_pictures([("data.params.train.params.on_bad_image", dataset)])
    lines = str(caught.value).splitlines()
    assert ["one.png" in lines[0], "two.jpg" in lines[1]] == [True, True]
    assert lines[2].startswith("2 of 3 pictures cannot be read")
    assert "data.params.train.params.on_bad_image=skip" in lines[2]


def test_where_all_pictures_are_broken_skipping_is_not_offered(make_root: MakeRoot) -> None:
    root = make_root()
    (root / "a").mkdir()
    (root / "a" / "bad.png").write_bytes(b"no picture")
    dataset = EveryDreamBatch(str(root), size=8)
    with pytest.raises(ValueError, match="1 of 1 pictures cannot be read: repair them") as caught:
        check_pictures([("on_bad_image", dataset)])
    assert "skip" not in str(caught.value)


def test_skipped_pictures_are_named_and_leave_the_set(make_root: MakeRoot, caplog: pytest.LogCaptureFixture) -> None:
    root = make_root("a/good.png")
    bad = root / "a" / "bad.png"
    bad.write_bytes(b"no picture")
    dataset = EveryDreamBatch(str(root), size=8, repeats=2, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        check_pictures([("on_bad_image", dataset)])
    assert (len(dataset), dataset.folder_counts, list(dataset.skipped)) == (2, {"a": 1}, [str(bad)])
    assert re.search(r"skipped .*bad\.png: not a picture", caplog.text)


def test_skipping_every_picture_is_an_error(make_root: MakeRoot) -> None:
    root = make_root()
    (root / "a").mkdir()
    (root / "a" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no picture in it can be read"):
        check_pictures([("on_bad_image", EveryDreamBatch(str(root), on_bad_image="skip"))])


def test_pictures_of_two_sets_are_decoded_once(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(every_dream, "find_broken_pictures", lambda paths: checked.extend(paths) or {})
    check_pictures([("a", EveryDreamBatch(root, size=8)), ("b", EDValidateBatch(root, size=8))])
    assert len(checked) == 3


def test_the_remedy_beside_other_problems_names_whole_keys(make_root: MakeRoot) -> None:
    root = make_root("a/b.png", "a/deep/c.png")
    (root / "a" / "cut.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data\.params\.train\.params\.on_bad_image=skip data\.params\.validation"):
        EveryDreamBatch(str(root))


def test_an_empty_caption_file_is_no_matter_of_the_name(make_root: MakeRoot) -> None:
    root = make_root("a/b.png", "a/_c.png")
    (root / "a" / "b.txt").write_text("")
    assert [Path(path).name for path in EveryDreamBatch(str(root)).empty_captions] == ["_c.png"]


def test_a_picture_that_vanished_is_an_error_that_names_it(root: str) -> None:
    dataset = EveryDreamBatch(root, size=8)
    assert len(dataset[0]["image"])
    Path(dataset.pictures[0].path).unlink()
    with pytest.raises(OSError, match=r"a cat\.webp"):
        dataset[0]


def test_pictures_without_a_caption_are_listed(make_root: MakeRoot) -> None:
    dataset = EveryDreamBatch(str(make_root("a/_1.png", "a/b.png")))
    assert [Path(path).name for path in dataset.empty_captions] == ["_1.png"]


def test_a_copy_in_another_process_does_not_read_the_folder_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(EveryDreamBatch(root, size=8, repeats=2))

    def fail(_: str) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(every_dream, "scan_data_root", fail)
    assert [item["caption"] for item in read_all(pickle.loads(pickled))] == ["a cat", "a man", "a man"] * 2


# --- shapes, crops and what folders say ---------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    """A square, a wide and a tall picture, whose pixels tell where they lie."""
    for name, (width, height) in {"square": (96, 96), "wide": (240, 120), "tall": (100, 150)}.items():
        across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        path = tmp_path / "shapes" / name / f"a {name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.stack([across, down, across], axis=2).astype(np.uint8)).save(path)
    return str(tmp_path / "shapes")


def test_pictures_keep_their_shape_unless_told_otherwise(shapes: str) -> None:
    dataset = EveryDreamBatch(shapes, size=64, repeats=1)
    sizes = {item["path"].rpartition("/")[2]: item["image"].shape[1::-1] for item in map(dataset.__getitem__, range(3))}
    assert sizes == {"a square.png": (64, 64), "a wide.png": (88, 40), "a tall.png": (48, 80)}
    assert dataset.training_sizes(0).tolist() == [list(dataset[index]["image"].shape[1::-1]) for index in range(3)]


def test_an_item_says_which_part_of_the_picture_it_shows(shapes: str) -> None:
    item = EveryDreamBatch(shapes, size=64, repeats=1)[1]
    left, top, right, bottom = item["crop"].tolist()
    assert item["training_size"].tolist() == [48, 80]
    assert (right - left) / (bottom - top) == pytest.approx(48 / 80)
    assert (left + right, top, bottom) == (100, 0, 150)


def crops(shapes: str, **params: Any) -> list[list[float]]:
    dataset = EveryDreamBatch(shapes, size=64, repeats=40, **params)
    wide = next(number for number, picture in enumerate(dataset.pictures) if picture.folder == "wide")
    return [dataset.showing(wide + 3 * repeat).placement.box for repeat in range(40)]  # type: ignore[misc]


def test_random_crops_lie_anywhere_and_jittered_ones_near_the_middle(shapes: str) -> None:
    # The bucket 88 x 40 takes all 240 of 240 pixels across and 109 of 120 down.
    anywhere = [top for _, top, _, _ in crops(shapes, crop="random")]
    near = [top for _, top, _, _ in crops(shapes, crop="jitter")]
    assert min(anywhere) < 1.5 < 9.4 < max(anywhere)
    assert 0 < max(near) - min(near) < max(anywhere) - min(anywhere)
    assert {tuple(box) for box in crops(shapes)} == {crops(shapes)[0]}


def test_validation_crops_the_middle_and_shows_captions_as_they_are(shapes: str) -> None:
    (Path(shapes) / "wide" / "a wide.txt").write_text("first, second, third, fourth")
    training = EveryDreamBatch(shapes, size=64, crop="random", shuffle_tags=True, set="train", repeats=1)
    validation = EveryDreamBatch(shapes, size=64, crop="random", shuffle_tags=True, set="val")
    assert training[2]["caption"] != validation[2]["caption"] == "first, second, third, fourth"
    assert training[2]["crop"].tolist() != validation[2]["crop"].tolist()
    left, top, right, bottom = validation[2]["crop"].tolist()
    assert (left + right, top + bottom) == (240, 120)


def test_kept_tags_keep_their_places(shapes: str) -> None:
    (Path(shapes) / "wide" / "a wide.txt").write_text("first, second, third, fourth, fifth")
    dataset = EveryDreamBatch(shapes, size=64, shuffle_tags=True, keep_tags=2, repeats=20)
    captions = {dataset.showing(2 + 3 * repeat).caption for repeat in range(20)}
    assert len(captions) > 3
    assert all(caption.startswith("first, second, ") for caption in captions)


def test_a_folders_own_settings_go_before_the_data_sets(shapes: str) -> None:
    (Path(shapes) / "wide" / "folder.yaml").write_text("flip_p: 1\nconditional_dropout: 1\nloss_weight: 0.25\n")
    dataset = EveryDreamBatch(shapes, size=64, repeats=1)
    items = {Path(item["path"]).parent.name: item for item in map(dataset.__getitem__, range(3))}
    wide, square = items["wide"], items["square"]
    assert (wide["flip"], wide["dropped"], wide["caption"], wide["loss_weight"].item()) == (True, True, "", 0.25)
    assert (square["flip"], square["dropped"], square["loss_weight"].item()) == (False, False, 1.0)
    assert wide["image"][0, 0, 0] > wide["image"][0, -1, 0]


def test_a_folders_settings_do_not_reach_the_validation(shapes: str) -> None:
    (Path(shapes) / "wide" / "folder.yaml").write_text(
        "multiply: 3\nflip_p: 1\nconditional_dropout: 1\nloss_weight: 0.5\n"
    )
    validation = EveryDreamBatch(shapes, size=64, set="val")
    items = [validation[index] for index in range(len(validation))]
    assert len(items) == 3
    assert not any(item["flip"] or item["dropped"] for item in items)
    assert all(item["loss_weight"] == 1 for item in items)


def test_a_folder_multiplied_by_nothing_is_left_out_and_told(shapes: str) -> None:
    (Path(shapes) / "wide" / "multiply.txt").write_text("0")
    dataset = EveryDreamBatch(shapes, size=64, repeats=2)
    assert dataset.switched_off == {"wide": 1}
    assert {picture.folder for picture in dataset.pictures} == {"square", "tall"}
    assert len(dataset) == 4


def test_a_filler_is_the_same_item_without_weight(shapes: str) -> None:
    dataset = EveryDreamBatch(shapes, size=64, repeats=2)
    filler, item = dataset[Filler(4)], dataset[4]
    assert (filler["loss_weight"].item(), item["loss_weight"].item()) == (0.0, 1.0)
    assert torch.equal(filler["exposure"], item["exposure"])
    assert np.array_equal(filler["image"], item["image"])


def test_bytes_are_the_numbers_that_scale_to_the_item(shapes: str) -> None:
    dataset, as_bytes = (EveryDreamBatch(shapes, size=64, repeats=1) for _ in range(2))
    as_bytes.as_bytes = True
    assert as_bytes[0]["image"].dtype == np.uint8
    scaled = bytes_to_unit_range(torch.as_tensor(as_bytes[0]["image"]))
    assert torch.equal(scaled, torch.as_tensor(dataset[0]["image"]))


def test_folders_below_subfolders_are_read_on_request(shapes: str) -> None:
    (Path(shapes) / "wide" / "deep").mkdir()
    (Path(shapes) / "wide" / "a wide.png").rename(Path(shapes) / "wide" / "deep" / "a wide.png")
    with pytest.raises(ValueError, match="deep"):
        EveryDreamBatch(shapes, size=64)
    assert [picture.folder for picture in EveryDreamBatch(shapes, size=64, recursive=True).pictures] == [
        "square",
        "tall",
        "wide/deep",
    ]


def test_a_header_that_cannot_be_read_names_every_such_picture(shapes: str) -> None:
    for name in ("wide", "tall"):
        (Path(shapes) / name / f"a {name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"(?s)a tall\.png.*a wide\.png.*2 of 3 pictures cannot be read"):
        EveryDreamBatch(shapes, size=64)[0]


@pytest.mark.parametrize("decode", [True, False])
def test_a_picture_cut_off_in_the_middle_is_found_by_decoding_alone(
    shapes: str, decode: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shapes) / "wide" / "a wide.png"
    path.write_bytes(path.read_bytes()[:-40])
    dataset = EveryDreamBatch(shapes, size=64)
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match=r"a wide") if decode else nullcontext():
        check_pictures([("on_bad_image", dataset)], decode)
    assert ("the headers of 3 pictures" in caplog.text) != decode


def test_leaving_pictures_out_renumbers_the_exposures(shapes: str) -> None:
    dataset = EveryDreamBatch(shapes, size=64, repeats=2)
    assert len(dataset) == len(dataset.training_sizes(0)) == 6
    dataset.leave_out({str(Path(shapes) / "square" / "a square.png"): "broken"})
    assert len(dataset) == len(dataset.training_sizes(0)) == 4
    assert dataset.training_sizes(0).tolist() == [list(dataset[index]["image"].shape[1::-1]) for index in range(4)]
    assert dataset.training_sizes(0).tolist() == [[48, 80], [88, 40]] * 2


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_line_end_in_a_broken_picture_s_name_makes_no_message_of_its_own(
    on_bad_image: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "root" / "folder0").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "root" / "folder0" / "good_.png")
    (tmp_path / "root" / "folder0" / "bad\nerror: all is lost_.png").write_bytes(b"no picture")
    dataset = EveryDreamBatch(str(tmp_path / "root"), on_bad_image=on_bad_image)
    caplog.set_level("INFO")
    said = caplog
    if on_bad_image == "error":
        with pytest.raises(ValueError, match="1 of 2 pictures") as caught:
            check_pictures([("key", dataset)])
        lines = str(caught.value).splitlines()
    else:
        check_pictures([("key", dataset)])
        lines = said.text.splitlines()
    assert not [line for line in lines if line.startswith("error:")]
    assert [line for line in lines if "bad\\nerror: all is lost_.png" in line]
