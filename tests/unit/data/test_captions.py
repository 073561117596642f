import pytest

from ldm.data.captions import caption_from_file_name, is_picture_name


# The first trainer's observed captions, but for what is changed on purpose: a picture's suffix never stays in
# the caption, and the spaces at its ends are stripped.
@pytest.mark.parametrize(
    ("file_name", "caption"),
    [
        ("a photo of a cat.jpg", "a photo of a cat"),
        ("a photo of a cat_1.jpg", "a photo of a cat"),
        ("a photo of a cat_(2).png", "a photo of a cat"),
        ("a_b_c.png", "a"),
        ("_leading underscore.png", ""),
        ("__two.png", ""),
        ("trailing_.png", "trailing"),
        ("no underscore no ext", "no underscore no ext"),
        ("under_score no ext", "under"),
        ("UPPER CASE.JPG", "UPPER CASE"),
        ("UPPER_1.JPEG", "UPPER"),
        ("dots.in.name.png", "dots.in.name"),
        ("dots.in.name_1.png", "dots.in.name"),
        ("v1.5 render_002.webp", "v1.5 render"),
        (" leading space_1.png", "leading space"),
        ("trailing space _1.png", "trailing space"),
        ("  two lead.png", "two lead"),
        ("double  space_1.png", "double  space"),
        ("café au lait_1.png", "café au lait"),
        ("猫の写真_1.png", "猫の写真"),
        ("emoji 😀_1.png", "emoji 😀"),
        ("comma, separated, tags_1.png", "comma, separated, tags"),
        ("a-b-c_1.png", "a-b-c"),
        ("it's (great)!_1.png", "it's (great)!"),
        ("50% off & more_1.png", "50% off & more"),
        ("tab\there_1.png", "tab\there"),
        ("new\nline_1.png", "new\nline"),
        (".hidden_1.png", ".hidden"),
        ("ends with dot._1.png", "ends with dot."),
        ("_1.png", ""),
        ("many___under.png", "many"),
        ("200 x 'x' + '_1.png'", "200 x 'x' + '"),
    ],
)
def test_the_caption_is_the_stem_up_to_the_first_underscore(file_name: str, caption: str) -> None:
    assert caption_from_file_name(file_name) == caption


def test_a_name_stored_decomposed_gives_the_composed_caption() -> None:
    assert caption_from_file_name("cafe\u0301_1.png") == "caf\u00e9"


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif", ".JPG", ".JfIf", ".WebP"])
def test_picture_suffixes_count_in_any_case(suffix: str) -> None:
    assert is_picture_name(f"a.b{suffix}")


@pytest.mark.parametrize("name", ["a.txt", "a.gif", "jpg", ".png", "a.png.txt", "a"])
def test_other_suffixes_are_no_pictures(name: str) -> None:
    assert not is_picture_name(name)
