from __future__ import annotations

import pytest
import torch

from ldm import lr_scheduler
from ldm.util import get_obj_from_str, instantiate_from_config, isimage, ismap, log_txt_as_img


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Linear", "not a dotted path"),
        ("torch.nnn.Linear", "cannot import 'torch.nnn'"),
        ("torch.nn.Liner", "has no 'Liner'"),
    ],
)
def test_a_target_that_names_nothing_says_which_part_is_wrong(target, message):
    with pytest.raises(ValueError, match=message):
        get_obj_from_str(target)


def test_a_config_without_target_is_an_error():
    with pytest.raises(ValueError, match="'target'"):
        instantiate_from_config({"params": {}})


@pytest.mark.parametrize(("target", "params"), [("os.mkdir", {"path": "made"}), ("shelve.open", {"filename": "made"})])
@pytest.mark.parametrize("kind", [torch.nn.Module, torch.utils.data.Dataset])
def test_a_target_of_another_kind_is_not_called(tmp_path, monkeypatch, kind, target, params):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"target '{target}' is"):
        instantiate_from_config({"target": target, "params": params}, kind)
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_an_installed_package_is_not_called():
    # It reads the file of the parameter pretrained, with whatever code is in that if the parameters say so.
    with pytest.raises(ValueError, match=r"is a function of an installed package; call it in a function of your own"):
        instantiate_from_config({"target": "open_clip.create_model", "params": {"model_name": "none"}}, torch.nn.Module)


@pytest.mark.parametrize("folder", ["home/.local/lib/python3/site-packages", "usr/lib/python3/dist-packages"])
def test_a_package_need_not_lie_where_this_python_installs_to_be_no_users_own(tmp_path, monkeypatch, folder):
    packages = tmp_path / folder
    packages.mkdir(parents=True)
    name = f"foreign_{len(folder)}"
    (packages / f"{name}.py").write_text("class Runs:\n    def __iter__(self):\n        return iter(())\n")
    monkeypatch.syspath_prepend(packages)
    with pytest.raises(ValueError, match=r"is not a data set; derive it from torch.utils.data.Dataset"):
        instantiate_from_config({"target": f"{name}.Runs"}, torch.utils.data.Dataset)


def test_captions_are_drawn_dark_on_white():
    page = log_txt_as_img((64, 32), ["hello", ""])
    assert page.shape == (2, 3, 32, 64)
    assert page[0].min() < -0.5
    assert page[1].min() == 1.0


def test_images_and_maps_are_told_apart_by_their_channels():
    assert isimage(torch.zeros(1, 3, 4, 4))
    assert ismap(torch.zeros(1, 4, 4, 4))
    assert not isimage(torch.zeros(1, 4, 4, 4))


def test_the_everydream_schedule_warms_up_decays_and_stays():
    schedule = lr_scheduler.EveryDreamScheduler(warm_up_steps=50, f_start=0.5, f_max=1.0, f_min=0.5, steps_to_min=10000)
    assert [schedule(step) for step in (0, 25, 50, 10000, 20000)] == [0.5, 0.75, 1.0, 0.5, 0.5]
    assert 0.5 < schedule(5000) < 1.0


def test_a_step_past_the_last_cycle_says_what_to_lengthen():
    schedule = lr_scheduler.LambdaLinearScheduler([0], [0.1], [1.0], [1.0], [10])
    with pytest.raises(ValueError, match="cycle_lengths sum to 10"):
        schedule(11)
