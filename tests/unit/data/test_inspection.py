import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.data_figures import bucket_figures, caption_figures, folder_figures
from ldm.data.every_dream import EveryDreamBatch
from ldm.data.folder_settings import FolderSettings
from ldm.data.inspection import (
    KINDS,
    SEVERITIES,
    Finding,
    caption_findings,
    copy_findings,
    decoding_findings,
    exit_status,
    fate_of,
    finding,
    line_finding,
    picture_findings,
    printable,
    quick_look,
    scan_findings,
    sort_findings,
    summarise,
)
from ldm.data.picture_header import PictureHeader
from ldm.data.scan import Picture, scan_data_root

MakeRoot = Callable[..., Path]


def header(width: int = 512, height: int = 512, **changes) -> PictureHeader:
    facts = {"format": "JPEG", "mode": "RGB", "orientation": 1, "frames": 1, "bits": 8, "transparent": False}
    return PictureHeader(width, height, **{**facts, "file_bytes": 1000, **changes})


def judge(
    path: str = "r/a/b.jpg", size: int | None = 512, resize_mode: str = "bucket", **facts
) -> list[tuple[str, str]]:
    found = picture_findings({path: header(**facts)}, size, resize_mode)
    return [(one.severity, one.kind) for one in found]


def captioned(name: str, caption: str, source: str = "file name", folder: str = "a") -> Picture:
    return Picture(f"r/{folder}/{name}", f"{folder}/{name}", folder, caption, source)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_a_plain_picture_is_good() -> None:
    assert judge() == []


@pytest.mark.parametrize("name", ["b.JPG", "b.jpeg", "b.jfif"])
def test_all_usual_extensions_fit(name: str) -> None:
    assert judge(f"r/a/{name}") == []


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"format": "PNG"}, ("warning", "wrong_extension")),
        ({"orientation": 6}, ("note", "rotated")),
        ({"transparent": True, "mode": "RGBA"}, ("note", "transparent")),
        ({"bits": 16}, ("note", "sixteen_bit")),
        ({"mode": "CMYK"}, ("warning", "cmyk")),
        ({"frames": 3}, ("warning", "animated")),
        ({"width": 8, "height": 8}, ("warning", "tiny")),
        ({"width": 300, "height": 300}, ("warning", "upscaled")),
        ({"width": 400, "height": 400}, ("note", "upscaled")),
        ({"width": 6000, "height": 600}, ("warning", "extreme_aspect")),
        ({"width": 600, "height": 6000}, ("warning", "extreme_aspect")),
    ],
)
def test_what_a_header_tells_is_judged(facts: dict, expected: tuple[str, str]) -> None:
    assert judge(**facts) == [expected]


def test_the_second_view_in_a_cameras_jpeg_is_no_animation() -> None:
    assert judge(format="MPO", frames=2) == []


def test_a_panorama_that_has_a_bucket_is_good_and_a_square_makes_it_extreme() -> None:
    assert judge(width=3800, height=1000) == []
    assert judge(width=3800, height=1000, resize_mode="squash") == [("warning", "extreme_aspect")]


def test_the_smallest_enlargement_of_a_buckets_rounding_is_good() -> None:
    assert judge(width=511, height=511) == []


def test_a_picture_that_keeps_its_own_size_is_never_enlarged_and_may_be_tiny() -> None:
    assert judge(width=400, height=400, size=None) == []
    assert judge(width=400, height=40, size=None) == [("warning", "extreme_aspect"), ("warning", "tiny")]


@pytest.mark.parametrize(
    ("source", "mode", "size", "box", "scale", "cropped"),
    [
        ((1024, 512), "squash", (512, 512), (0, 0, 1024, 512), 1.0, 0.0),
        ((1024, 512), "center_crop", (512, 512), (256, 0, 768, 512), 1.0, 0.5),
        ((900, 900), "bucket", (512, 512), (0, 0, 900, 900), 512 / 900, 0.0),
    ],
)
def test_a_fate_says_size_box_scale_and_loss(source, mode, size, box, scale, cropped) -> None:
    fate = fate_of(source, 512, mode)
    assert (fate.size, fate.box) == (size, box)
    assert (fate.scale, fate.cropped) == (pytest.approx(scale), pytest.approx(cropped))


def test_a_picture_that_cannot_be_read_is_an_error_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("text")
    reasons = {
        str(tmp_path / "empty.png"): "is empty",
        str(tmp_path / "text.png"): "is no picture",
        "big.png": "a decompression bomb",
    }
    found = picture_findings(reasons, 512, "bucket")
    assert [(one.severity, one.kind) for one in found] == [
        ("error", "empty_file"),
        ("error", "unreadable"),
        ("error", "decompression_bomb"),
    ]


def test_decoding_settles_what_may_be_transparent_and_adds_what_is_broken() -> None:
    headers = {
        name: header(transparent=True, mode="RGBA", format="PNG") for name in ("clear.png", "solid.png", "x.png")
    }
    before = picture_findings(headers, 512, "bucket")
    after = decoding_findings(headers, {"x.png": "is cut short"}, {"solid.png"}, before)
    assert [(one.path, one.severity, one.kind) for one in sort_findings(after)] == [
        ("x.png", "error", "unreadable"),
        ("clear.png", "warning", "transparent"),
        ("x.png", "note", "transparent"),
    ]


def test_of_two_copies_the_worse_is_named_with_the_better_one_beside_it() -> None:
    (found,) = copy_findings("near_duplicate", [["small", "large"]], {"small": (-10.0,), "large": (-90.0,)})
    assert (found.path, found.others, found.reason) == ("small", ("large",), "looks like large")


# --- captions -----------------------------------------------------------------------------------------------------


def kinds_of(pictures: list[Picture], **options) -> dict[str, tuple[str, str]]:
    return {one.path: (one.severity, one.kind) for one in caption_findings(pictures, {}, **options)}


def test_numbered_names_share_a_caption_on_purpose() -> None:
    found = kinds_of([captioned("a man_(1).jpg", "a man"), captioned("a man_(2).jpg", "a man")])
    assert set(found.values()) == {("note", "shared_caption")}


def test_the_same_name_twice_without_a_number_is_likely_a_slip() -> None:
    found = kinds_of([captioned("a man.jpg", "a man"), captioned("a man.png", "a man")])
    assert set(found.values()) == {("warning", "shared_caption")}


def test_a_short_text_in_many_caption_files_is_the_way_to_train_a_subject_and_a_detailed_one_is_not() -> None:
    short = kinds_of([captioned(f"{n}.jpg", "photo of john doe", "txt") for n in "ab"])
    long = kinds_of([captioned(f"{n}.jpg", "a tall man in a red coat walks two dogs", "txt") for n in "ab"])
    assert set(short.values()) == {("note", "shared_caption")}
    assert set(long.values()) == {("warning", "shared_caption")}


def test_copies_of_one_picture_may_share_a_caption() -> None:
    pictures = [captioned("a man.jpg", "a man"), captioned("a man.png", "a man")]
    assert kinds_of(pictures, alike=[["r/a/a man.jpg", "r/a/a man.png"]]) == {}


def test_an_empty_caption_is_told_with_its_source() -> None:
    found = caption_findings(
        [captioned("_1.jpg", ""), captioned("b.jpg", "", "txt"), captioned("c.jpg", "", "jsonl")], {}
    )
    assert [one.reason for one in found] == [
        "nothing stands before the first underscore of its name",
        "its .txt file is empty",
        "the folder's list gives it an empty text",
    ]


def test_a_caption_that_cannot_be_read_is_not_called_empty_too() -> None:
    assert kinds_of([captioned("b.jpg", "", "txt")], broken_sidecars={"r/a/b.txt"}) == {}


def test_a_cut_caption_is_told_with_the_words_that_are_lost() -> None:
    (found,) = caption_findings([captioned("b.jpg", "long text")], {"long text": "text"})
    assert (found.kind, found.reason) == ("cut_caption", "loses 'text'")


def test_one_picture_without_the_file_that_the_others_have_is_told() -> None:
    written = [captioned(f"{n}.jpg", f"text {n}", "txt") for n in "abcd"]
    assert kinds_of([*written, captioned("red.jpg", "red")]) == {"r/a/red.jpg": ("warning", "missing_caption")}
    mixed = [captioned(f"thing {n}.jpg", f"thing {n}") for n in "abcd"]
    assert kinds_of([*written, *mixed]) == {}


@pytest.mark.parametrize("caption", ["IMG", "0001", "DSC01234", "3f9a8b7c6d5e4f3a2b1c"])
@pytest.mark.parametrize("suffix", ["", "_2"])
def test_captions_that_a_camera_gave_are_noted_once_a_folder(caption: str, suffix: str) -> None:
    assert kinds_of([captioned(f"{caption}{suffix}.jpg", caption)]) == {"r/a": ("note", "file_names")}


@pytest.mark.parametrize("caption", ["a cat", "image of a dog", "42nd street", "cat", "photograph"])
def test_words_are_no_camera_names(caption: str) -> None:
    assert kinds_of([captioned(f"{caption}.jpg", caption)]) == {}


# --- folders ------------------------------------------------------------------------------------------------------


def located(root: Path) -> set[tuple[str, str, str]]:
    found = scan_findings(scan_data_root(str(root), named=None), str(root))
    return {(os.path.relpath(one.path, root), one.severity, one.kind) for one in found}


def test_what_a_scan_finds_is_located_and_named(make_root: MakeRoot) -> None:
    root = make_root("stray.png", "a/1.png", "a/deep/2.png", "off/3.png", "off/4.png", "a/x: y.png")
    (root / "off" / "multiply.txt").write_text("0")
    (root / "a" / "lost.txt").write_text("text")
    (root / "a" / "1.txt").write_bytes(b"\xe9")
    (root / "a" / "x: y.caption").write_bytes(b"\xe9")
    (root / "a" / "moving.gif").touch()
    (root / "a" / "notes.pdf").touch()
    assert located(root) == {
        ("stray.png", "error", "in_root"),
        ("a/deep/2.png", "error", "too_deep"),
        ("a/1.txt", "error", "bad_sidecar"),
        ("a/x: y.caption", "error", "bad_sidecar"),
        ("a/lost.txt", "warning", "orphan"),
        ("a/moving.gif", "warning", "other_format"),
        ("off", "note", "switched_off"),
    }


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    assert located(tmp_path) == {(".", "error", "no_pictures")}


def test_every_path_of_a_problem_is_found_however_many(make_root: MakeRoot) -> None:
    root = make_root("a/1.png", *(f"{number}.png" for number in range(50)))
    assert sum(kind == "in_root" for _, _, kind in located(root)) == 50


def test_an_error_keeps_what_its_line_says_to_do() -> None:
    found = line_finding("error", "a/b.txt: is UTF-16 text; save it as UTF-8")
    assert (found.path, found.reason, found.remedy) == ("a/b.txt", "is UTF-16 text", "save it as UTF-8")


# --- all together -------------------------------------------------------------------------------------------------


def test_the_gravest_finding_decides_the_exit_status() -> None:
    note, warning, error = (finding("x", severity, "rotated", "") for severity in reversed(SEVERITIES))
    assert [exit_status(found) for found in ([], [note], [note, warning], [error, note])] == [0, 0, 1, 2]


def test_findings_are_sorted_by_severity_kind_and_path() -> None:
    found = [
        finding("b", "note", "rotated", ""),
        finding("b", "error", "unreadable", ""),
        finding("a", "error", "unreadable", ""),
        finding("c", "error", "no_pictures", ""),
    ]
    assert [(one.severity, one.path) for one in sort_findings(found)] == [
        ("error", "c"),
        ("error", "a"),
        ("error", "b"),
        ("note", "b"),
    ]


def test_every_kind_says_what_to_do() -> None:
    assert all(kind.title and kind.remedy for kind in KINDS.values())


def test_names_are_shown_on_one_line_without_steering_a_terminal() -> None:
    assert printable("a\nb\x1b[31m \u202egnp\u200b \udcff café 猫") == r"a\nb\x1b[31m \u202egnp\u200b \xff café 猫"


# --- the look before training -------------------------------------------------------------------------------------


def test_a_quick_look_warns_of_built_sets_without_opening_a_file(make_root: MakeRoot) -> None:
    root = make_root("a/a cat.png", "a/_1.png", "a/a dog.png")
    Image.new("RGB", (60, 60)).save(root / "a" / "a dog.png")
    dataset = EveryDreamBatch(data_root=str(root), size=64)
    assert dataset.source_sizes.shape == (3, 2)
    for picture in dataset.pictures:
        os.remove(picture.path)
    found = quick_look([dataset, dataset])
    assert [(os.path.basename(one.path), one.kind) for one in found] == [
        ("_1.png", "tiny"),
        ("a cat.png", "tiny"),
        ("a dog.png", "upscaled"),
    ]


def test_a_quick_look_with_headers_judges_formats_too(make_root: MakeRoot) -> None:
    root = make_root("a/a cat.png", "a/a dog.png")
    dataset = EveryDreamBatch(data_root=str(root), size=8)
    headers = {picture.path: header(8, 8, mode="CMYK", format="PNG") for picture in dataset.pictures}
    assert [one.kind for one in quick_look([dataset], headers)] == ["cmyk", "cmyk"]


def test_a_summary_has_one_line_a_kind_and_names_a_few() -> None:
    found = [Finding(f"{number}.png", "warning", "tiny", "8x8", "") for number in range(5)]
    found.append(Finding("x\n.png", "warning", "cmyk", "inks", ""))
    assert summarise(found, most=2) == [
        "tiny pictures (5): 0.png: 8x8; 1.png: 8x8; and 3 more",
        r"pictures in CMYK (1): x\n.png: inks",
    ]


# --- figures ------------------------------------------------------------------------------------------------------


def test_folders_share_an_epoch_by_pictures_and_multiplier() -> None:
    pictures = [captioned(f"{n}.jpg", "x", folder="man") for n in range(3)]
    pictures += [captioned(f"{n}.jpg", "x", folder="man_laion") for n in range(2)]
    settings = {"man": FolderSettings(), "man_laion": FolderSettings(multiply=Fraction(1, 2))}
    sizes = {picture.path: 10 for picture in pictures}
    man, laion, empty = folder_figures({"man": 3, "man_laion": 2, "none": 0}, pictures, sizes, settings, repeats=4)
    assert (man.exposures, man.share, man.file_bytes, man.is_ground_truth) == (12, 0.75, 30, False)
    assert (laion.exposures, laion.share, laion.is_ground_truth) == (4, 0.25, True)
    assert (empty.pictures, empty.exposures, empty.share) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        *(
            (name, True)
            for name in ("man_laion", "man_nvflickr", "FFHQ", "ground truth", "reg", "10_reg man", "coco 2017")
        ),
        *((name, False) for name in ("man", "coconuts", "region", "a/close ups", "flick")),
    ],
)
def test_ground_truth_is_known_by_its_name(folder: str, expected: bool) -> None:
    (row,) = folder_figures({folder: 0}, [], {}, {}, repeats=1)
    assert row.is_ground_truth is expected


def test_buckets_are_counted_from_tall_to_wide_with_what_is_lost() -> None:
    sources = {"a": (500, 1000), "b": (600, 600), "c": (300, 300), "d": (1000, 500)}
    rows = bucket_figures({name: fate_of(source, 512, "bucket") for name, source in sources.items()})
    assert [(row.size[0] < row.size[1], row.pictures, row.upscaled) for row in rows] == [
        (True, 1, 0),
        (False, 2, 1),
        (False, 1, 0),
    ]
    assert rows[0].most_cropped == pytest.approx(rows[0].cropped)
    assert rows[1].cropped == 0


def test_captions_are_counted_by_pictures() -> None:
    pictures = [
        captioned("1.jpg", "a red cat"),
        captioned("2.jpg", "a red cat"),
        captioned("3.jpg", "the dog's bed", "txt"),
    ]
    figures = caption_figures(pictures, {"a red cat": 3, "the dog's bed": 4})
    assert figures.sources == {"file name": 2, "txt": 1}
    assert figures.words == [("cat", 2), ("red", 2), ("bed", 1), ("dog's", 1)]
    assert figures.shared == [("a red cat", 2)]
    assert (figures.lengths, figures.different) == ({3: 2, 4: 1}, 2)
    assert (figures.percentile(0.5), figures.percentile(0.95)) == (3, 4)
