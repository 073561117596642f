from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest

from ldm.training.console import console

log = logging.getLogger("ldm.somewhere")


def test_messages_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console(rank=0, debug=False):
        log.info("images: %d", 3)
        log.debug("hidden")
    assert capsys.readouterr().out == "images: 3\n"


def test_warnings_say_that_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with console(rank=0, debug=False):
        log.warning("left out")
    assert capsys.readouterr().out == "warning: left out\n"


@pytest.mark.parametrize(
    "text",
    [
        "You called `self.log('train/loss', ..., logger=True)` but have no logger configured.",
        "You requested to overfit but enabled train dataloader shuffling.",
        "The dirpath has changed from 'a' to 'b', therefore `best_model_score` won't be reloaded.",
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
        "You are trying to `self.log()` but `Trainer(barebones=True)` is configured.",
        "Detected pickle protocol 4 in the checkpoint, which was not the default pickle protocol used by `torch.load`",
    ],
)
def test_remarks_on_what_is_decided_are_settled(text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with console(rank=0, debug=False):
            warnings.warn(text, stacklevel=1)
    assert not caught


def test_other_processes_of_a_run_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console(rank=1, debug=False):
        log.info("images: 3")
    assert capsys.readouterr().out == ""


def test_nothing_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = list(logging.getLogger("ldm").handlers), logging.getLogger("ldm").level
    with console(rank=0, debug=True):
        pass
    assert (list(logging.getLogger("ldm").handlers), logging.getLogger("ldm").level) == (handlers, level)


@pytest.mark.parametrize(("debug", "count"), [(False, 0), (True, 1)])
def test_settled_warnings_are_shown_only_for_debugging(debug: bool, count: int) -> None:
    text = "The 'val_dataloader' does not have many workers which may be a bottleneck. Consider more."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with console(rank=0, debug=debug):
            warnings.warn(text, stacklevel=1)
    assert len(seen) == count


def test_a_letter_that_the_console_lacks_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    with console(rank=0, debug=False):
        log.info("left out: 猫.jpg, é.jpg")
    assert written.getvalue().decode("cp1252").strip() == "left out: ?.jpg, é.jpg"


def test_names_and_captions_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console(rank=0, debug=False):
        log.info("left out: \x1b]0;owned\x07\x9b2J\r\u202egpj.exe, 猫\tand\n  é")
    assert capsys.readouterr().out == "left out: \\x1b]0;owned\\x07\\x9b2J\\r\\u202egpj.exe, 猫\tand\n  é\n"


def test_output_that_nobody_reads_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with console(rank=0, debug=False):
        log.info("images: 3")
