from __future__ import annotations

from PIL import Image

from ldm.data.class_folders import ClassFolders


def test_each_subfolder_is_a_class_in_alphabetical_order(tmp_path):
    for folder, count in (("dogs", 2), ("cats", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"a picture_({number}).png")
    dataset = ClassFolders(str(tmp_path), size=8, repeats=2)
    assert dataset.classes == ["cats", "dogs"]
    labels = {dataset[index]["path"]: dataset[index]["class_label"] for index in range(len(dataset))}
    assert sorted(labels.values()) == [0, 1, 1]
    assert all(("cats" in path) == (label == 0) for path, label in labels.items())
