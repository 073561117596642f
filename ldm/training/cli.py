"""The command line: flags and overrides in, one frozen record out.

``argparse`` declares and converts the flags. The walk over the words is our own, for three things that
argparse does not do: a bare ``-t`` may be followed by ``key.path=value``, every mistake is reported at
once, and a mistyped flag is answered with the nearest one there is.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from pytorch_lightning import Trainer

from ldm.training.annotations import accepts_boolean, describe, parse_boolean, parse_text
from ldm.training.config_tree import nearest, usable_path
from ldm.training.legacy_2022 import FLAG_WORDS, TRAINER_WORDS, Word
from ldm.training.run_directory import AUTO, NEWEST_RUN
from ldm.training.targets import Parameter, accepted_parameters

EXAMPLE: Final = (
    "python main.py --base configs/stable-diffusion/v1-finetune_everydream.yaml -t "
    "--actual_resume sd_v1-5_vae.ckpt -n MyProjectName --gpus 0, --data_root training_samples/MyProject"
)
_OVERRIDE: Final = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)
_NUMBER: Final = re.compile(r"-\d")

TRAINER_OBJECTS: Final[Mapping[str, str]] = {
    "callbacks": "list callbacks in the YAML, under lightning.callbacks",
    "plugins": "plugins are objects; use --strategy and --precision",
}
"""Trainer arguments that no word can give, and what to do instead."""

NAMING_FLAGS: Final[Mapping[str, str]] = {
    "logdir": "-l/--logdir",
    "postfix": "-f/--postfix",
    "datadir_in_name": "--datadir_in_name",
}
"""Flags that say where a new run's folder goes and what it is called, beside ``--name``."""


@dataclass(frozen=True)
class Options:
    """What a command line said.

    ``seed``, ``name``, ``postfix``, ``project``, ``logdir``, ``data_root``, ``actual_resume``, ``warm_optimizer``,
    ``on_nan``, ``on_oom``, ``scale_lr``, ``datadir_in_name``, ``debug`` and ``no_test`` also end up in the merged
    config's ``run`` section, where a run reads them: there a saved config may have given what the command line left
    out.

    Attributes:
        base: YAML files, merged from left to right.
        train: whether to train.
        resume: run folder, or checkpoint in one, to continue; ``last``: the newest one in ``logdir``; ``auto``: the
            newest one of that ``name``, which is begun where there is none.
        accept_changes: whether to continue a run although its data or settings have changed.
        name: the run's name, a part of its folder's name.
        project: folder of the project; a part of the lineage's command line.
        debug: whether to open a debugger on an error.
        seed: seed of every random draw.
        postfix: added to the run folder's name.
        logdir: folder that holds the run folders.
        scale_lr: whether to multiply the learning rate by the pictures in an optimiser step.
        no_test: whether to leave out the test after training.
        datadir_in_name: whether the run folder's name begins with the data folder's.
        actual_resume: checkpoint whose weights a new run starts from.
        warm_optimizer: whether it starts with that checkpoint's optimiser state too.
        on_bad_image: what is done about pictures that cannot be read: ``error``, ``skip``; None: as the data sets say.
        on_nan: what is done about a loss or gradient that is no finite number: ``stop`` or ``skip``.
        on_oom: what is done about a batch that does not fit into memory: ``stop`` or ``split``.
        data_root: folder of subfolders of pictures.
        gpus: numbers of GPUs such as ``0,``; None where the flag was not given.
        print_config: whether to show the merged config and end.
        memory_plan: GB of a card to predict the need of memory for, and end; 0: this machine's GPU; None: train.
        trainer_args: arguments for Lightning's Trainer that were given.
        overrides: ``key.path=value`` words, in order.
        given: names of the fields above that the command line named.
        notices: one line for each word of 2022 that was translated or dropped.
    """

    base: list[str] = field(default_factory=list)
    train: bool = False
    resume: str | None = None
    accept_changes: bool = False
    name: str | None = None
    project: str | None = None
    debug: bool = False
    seed: int = 23
    postfix: str = ""
    logdir: str = "logs"
    scale_lr: bool = False
    no_test: bool = False
    datadir_in_name: bool = True
    actual_resume: str | None = None
    warm_optimizer: bool = False
    on_bad_image: str | None = None
    on_nan: str = "stop"
    on_oom: str = "stop"
    data_root: str | None = None
    gpus: str | None = None
    print_config: bool = False
    memory_plan: float | None = None
    trainer_args: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    given: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)


def trainer_parameters() -> dict[str, Parameter]:
    """Read the arguments of Lightning's Trainer from its signature.

    Returns:
        The parameters by name, in the signature's order.
    """
    return accepted_parameters(Trainer).parameters


def parse_options(argv: Sequence[str]) -> Options:
    """Read a command line.

    Args:
        argv: the words after the program's name.

    Returns:
        What they say.

    Raises:
        ValueError: one line for each mistake.
        SystemExit: help was asked for, and printed.
    """
    if not argv:
        raise ValueError(f"nothing was asked for; the everyday command (--help explains it): {EXAMPLE}")
    parser, flags = _build_parser()
    words = _Words(parser, flags)
    words.read(list(argv))
    values = vars(words.namespace)
    trainer_names = trainer_parameters()
    fields = {name: value for name, value in values.items() if name not in trainer_names}
    _check_together(fields, words.problems)
    if words.problems:
        raise ValueError("\n".join(words.problems))
    return Options(
        **fields,
        trainer_args={name: values[name] for name in trainer_names if name in values},
        overrides=words.overrides,
        given=frozenset(fields),
        notices=words.notices,
    )


def _check_together(fields: dict[str, Any], problems: list[str]) -> None:
    """Check what the flags say together."""
    # What begins a run goes together with ``auto``, which begins one where there is none to continue.
    resumes = fields.get("resume") and fields["resume"] != AUTO
    if fields.get("name") and resumes:
        problems.append(
            "-n/--name and -r/--resume exclude each other: a resumed run keeps its folder and name; "
            "leave out -n, or start a new run from the weights with --actual_resume"
        )
    for flag in ("logdir", "postfix", "datadir_in_name"):
        names_place_of_newest = flag == "logdir" and fields.get("resume") in NEWEST_RUN
        if flag in fields and resumes and not names_place_of_newest:
            problems.append(
                f"{NAMING_FLAGS[flag]} and -r/--resume exclude each other: a resumed run stays in its folder; leave "
                f"out {NAMING_FLAGS[flag].partition('/')[0]}"
            )
    if fields.get("actual_resume") and resumes:
        problems.append(
            "--actual_resume and -r/--resume exclude each other: -r continues a run from its own checkpoint, "
            "--actual_resume starts a new run; leave out one"
        )
    if fields.get("warm_optimizer") and resumes:
        problems.append(
            "--warm_optimizer and -r/--resume exclude each other: -r takes all of the run's state; "
            "leave out --warm_optimizer"
        )
    elif fields.get("warm_optimizer") and not fields.get("actual_resume"):
        problems.append(
            "--warm_optimizer starts a new run with a checkpoint's optimiser state: name the checkpoint with "
            "--actual_resume CKPT"
        )
    if fields.get("accept_changes") and not fields.get("resume"):
        problems.append(
            "--accept_changes belongs to -r/--resume: it continues a run although its data or settings have changed; "
            "leave it out"
        )
    if not fields.get("base") and not fields.get("resume"):
        problems.append(
            "no config was given: add --base configs/stable-diffusion/v1-finetune_everydream.yaml "
            "(or your own copy), or -r RUN_FOLDER to continue a run"
        )
    if not fields.get("train") and not fields.get("print_config") and "memory_plan" not in fields:
        problems.append("nothing was asked for: add -t to train, or --print_config to see the merged config")


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises what argparse would print."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _Words:
    """The walk over a command line's words."""

    def __init__(self, parser: _Parser, flags: dict[str, argparse.Action]) -> None:
        self.parser = parser
        self.flags = flags
        self.namespace = argparse.Namespace()
        self.overrides: list[str] = []
        self.notices: list[str] = []
        self.problems: list[str] = []

    def read(self, words: list[str]) -> None:
        """Sort all words into flags with values, overrides and mistakes."""
        position = 0
        while position < len(words):
            word = words[position]
            position += 1
            if word == "--":
                continue
            if _is_override(word):
                self.overrides.append(word)
            elif not _is_flag(word):
                self.problems.append(
                    f"{word!r} belongs to no flag; an override is written key.path=value, a value with spaces in quotes"
                )
            else:
                flag, has_value, value = word.partition("=")
                following = words[position:]
                taken = self._flag(flag, value if has_value else None, following)
                position += taken

    def _flag(self, flag: str, attached: str | None, following: list[str]) -> int:
        """Handle one flag; returns how many of the following words are its values."""
        action = self.flags.get(flag)
        name = flag.lstrip("-")
        if action is None:
            old = FLAG_WORDS.get(name) or TRAINER_WORDS.get(name) if flag.startswith("--") else None
            values = [] if attached is not None else _values(following)
            if old is not None:
                self._old_flag(flag, old, attached, values)
            else:
                self.problems.append(self._unknown(flag))
            return len(values)
        if attached is not None:
            self._convert(flag, [f"{flag}={attached}"])
            return 0
        if action.nargs == 0:
            self._convert(flag, [flag])
            return 0
        if action.nargs == "+":
            values = _values(following)
            self._convert(flag, [flag, *values])
            return len(values)
        values = following[:1]
        if values and (_is_flag(values[0]) or (action.nargs == "?" and _is_override(values[0]))):
            values = []
        self._convert(flag, [f"{flag}={values[0]}"] if values else [flag])
        return len(values)

    def _convert(self, flag: str, words: list[str]) -> None:
        """Let argparse convert one flag with its values into the namespace."""
        try:
            self.parser.parse_args(words, self.namespace)
        except ValueError as error:
            reason = str(error).removeprefix("argument ")
            if "expected one argument" in reason or "expected at least one argument" in reason:
                wanted = self.flags[flag].metavar or "VALUE"
                reason = f"{flag}: a value is missing; write {flag} {wanted}"
            self.problems.append(reason)

    def _old_flag(self, flag: str, old: Word, attached: str | None, values: list[str]) -> None:
        """Translate, drop or refuse a flag of 2022."""
        if old.becomes:
            new = f"--{old.becomes}"
            words = [f"{new}={attached}"] if attached is not None else [new, *values[:1]]
            self.notices.append(f"flag {flag}: read as {' '.join(words)}, its name today")
            self._convert(new, words)
        elif old.refused:
            self.problems.append(f"flag {flag}: {old.reason}")
        else:
            self.notices.append(f"flag {flag}: dropped, {old.reason}")

    def _unknown(self, flag: str) -> str:
        """Answer a flag that does not exist."""
        if not flag.startswith("--") and f"-{flag}" in self.flags:
            return f"unknown flag {flag}; long flags have two dashes: did you mean -{flag}?"
        if not flag.startswith("--") and flag[:2] in self.flags:
            return f"unknown flag {flag}; did you mean {flag[:2]} {flag[2:]}?"
        match = nearest(flag.replace("-", "_"), [known.replace("-", "_") for known in self.flags])
        found = next((known for known in self.flags if known.replace("-", "_") == match), None)
        if found is None:
            return f"unknown flag {flag}; python main.py --help lists all flags, key.path=value sets any YAML value"
        return f"unknown flag {flag}; did you mean {found}?"


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NUMBER.match(word)


def _is_override(word: str) -> bool:
    return _OVERRIDE.match(word) is not None and not os.path.isfile(word)


def _values(words: list[str]) -> list[str]:
    """Take the words up to the next flag or override."""
    taken: list[str] = []
    for word in words:
        if _is_flag(word) or _is_override(word):
            break
        taken.append(word)
    return taken


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make argparse show a reader's own message."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _whole_number(text: str) -> int:
    return int(parse_text(text, int))


def _gigabytes(text: str) -> float:
    size = float(parse_text(text, float))
    if not 0 < size < math.inf:
        raise ValueError(f"--memory_plan {text}: give the card's memory in GB, such as 24")
    return size


def _trainer_reader(name: str, annotation: Any) -> Callable[[str], Any]:
    """Make the reader of one Trainer flag."""

    def read(text: str) -> Any:
        try:
            return parse_text(text, annotation)
        except ValueError:
            if name in TRAINER_OBJECTS:
                raise ValueError(f"{TRAINER_OBJECTS[name]}, not on the command line") from None
            raise

    return read


def _build_parser() -> tuple[_Parser, dict[str, argparse.Action]]:
    """Declare all flags; returns the parser and each flag's action by its spellings."""
    parser = _Parser(
        prog="main.py",
        usage="python main.py --base CONFIG.yaml [...] -t [flags] [key.path=value ...]",
        description="Fine-tunes a Stable Diffusion v1 model on a folder of captioned pictures.\n\n"
        "The everyday command, on one line:\n"
        f"{textwrap.indent(textwrap.fill(EXAMPLE, 100, break_long_words=False, break_on_hyphens=False), '  ')}",
        epilog="Any YAML value can be set on the command line, such as data.params.batch_size=2 or\n"
        "data.params.train.params.repeats=20. --print_config shows the result and where each value came from.\n\n"
        "Exit status: 0 done, or nothing left to do; 1 an unexpected failure; 2 something to put right, as the lines\n"
        "that begin with error: say; 130 (Ctrl-C), 143 (SIGTERM), 129 (the terminal was closed) and 149 (Ctrl-Break):\n"
        "stopped as asked, and saved if training had begun. SIGUSR1 saves, and training goes on.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    flags: dict[str, argparse.Action] = {}

    def add(group: argparse._ArgumentGroup, *names: str, **settings: Any) -> None:
        action = group.add_argument(*names, **settings)
        flags.update(dict.fromkeys(names, action))

    def add_boolean(group: argparse._ArgumentGroup, *names: str, **settings: Any) -> None:
        add(group, *names, nargs="?", const=True, type=_reader(parse_boolean), metavar="true|false", **settings)

    path = _reader(usable_path)
    what = parser.add_argument_group("what to do")
    add(
        what,
        "-b",
        "--base",
        nargs="+",
        action="extend",
        type=path,
        metavar="YAML",
        help="config files, merged from left to right",
    )
    add_boolean(what, "-t", "--train", help="train; without it nothing is trained")
    add(
        what,
        "-r",
        "--resume",
        type=path,
        metavar="RUN",
        help="continue a run: its folder, a checkpoint in it, or last: the newest in the log folder; needs no --base; "
        "auto: the newest of the name -n, or begin it where there is none, as --base and the other flags say",
    )
    add_boolean(
        what,
        "--accept_changes",
        help="with -r: go on although data or settings have changed in a way that changes the run",
    )
    add(
        what,
        "--actual_resume",
        type=path,
        metavar="CKPT",
        help="start a new run from a checkpoint's weights (.ckpt or .safetensors)",
    )
    add_boolean(
        what, "--warm_optimizer", help="with --actual_resume: take the optimiser's state from that checkpoint too"
    )
    add(
        what,
        "--data_root",
        type=path,
        metavar="FOLDER",
        help="folder that holds subfolders of captioned pictures",
    )
    add(
        what,
        "--gpus",
        metavar="N,",
        help="GPUs by number: 0, (the first), 0,1 (the first two), -1 (all); without it, and where the YAML asks "
        "for none, the CPU",
    )
    add_boolean(what, "--print_config", help="show the merged config with the origin of each value, and end")
    add(
        what,
        "--memory_plan",
        nargs="?",
        const=0.0,
        type=_reader(_gigabytes),
        metavar="GB",
        help="predict how much GPU memory training needs, and the largest batch for this machine's GPU, or for a card "
        "of so many GB; and end",
    )
    add(what, "-h", "--help", action="help", help="show this text and end")

    where = parser.add_argument_group("the run and its folder, LOGDIR/<data folder><date>_NAME")
    add(where, "-n", "--name", help="name of the run")
    add(where, "-f", "--postfix", help="added to the folder's name")
    add(where, "-l", "--logdir", type=path, metavar="FOLDER", help="where run folders are made (default: logs)")
    add_boolean(where, "--datadir_in_name", help="begin the folder's name with the data folder's (default: true)")
    add(
        where,
        "-p",
        "--project",
        type=path,
        metavar="PROJECT",
        help="name of the project; only recorded in the saved config",
    )

    how = parser.add_argument_group("how to train")
    add(
        how,
        "-s",
        "--seed",
        type=_reader(_whole_number),
        metavar="N",
        help="seed of every random draw (default: 23; -1 draws one)",
    )
    add_boolean(
        how,
        "--scale_lr",
        help="multiply the learning rate by accumulation x GPUs x batch size (default: false)",
    )

    def add_choice(name: str, choices: tuple[str, ...], text: str) -> None:
        add(how, name, choices=choices, metavar="|".join(choices), help=text)

    add_choice(
        "--on_bad_image",
        ("error", "skip"),
        "pictures that cannot be read, before or during training: end the run, or go on without them and list them at "
        "the end (default: as the YAML says)",
    )
    add_choice(
        "--on_nan",
        ("stop", "skip"),
        "a loss or gradient that is no finite number: end the run, or leave the step out (default: stop)",
    )
    add_choice(
        "--on_oom",
        ("stop", "split"),
        "a batch that does not fit into memory: end the run, or take it in parts, with the same result (default: stop)",
    )
    add_boolean(how, "--no-test", help="leave out the test after training")
    add_boolean(how, "-d", "--debug", help="open a debugger on an error")

    parameters = trainer_parameters()
    trainer = parser.add_argument_group("arguments of Lightning's Trainer, with defaults", _trainer_help(parameters))
    for name, parameter in parameters.items():
        optional = {"nargs": "?", "const": True} if accepts_boolean(parameter.annotation) else {}
        add(
            trainer,
            f"--{name}",
            type=_reader(_trainer_reader(name, parameter.annotation)),
            help=argparse.SUPPRESS,
            metavar=f"VALUE ({describe(parameter.annotation)})",
            **optional,
        )
    return parser, flags


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves line breaks of descriptions alone, and room for the flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=112)


def _trainer_help(parameters: Mapping[str, Parameter]) -> str:
    """List the Trainer's flags in a few lines."""
    shown = []
    for name, parameter in parameters.items():
        default = parameter.default
        known = default is not inspect.Parameter.empty and default is not None
        shown.append(
            f"--{name}\N{NO-BREAK SPACE}{str(default).lower() if isinstance(default, bool) else default}"
            if known
            else f"--{name}"
        )
    listed = textwrap.fill("  ".join(shown), 108, break_long_words=False, break_on_hyphens=False)
    return f"{listed}\nSee https://lightning.ai/docs/pytorch/stable/common/trainer.html".replace(
        "\N{NO-BREAK SPACE}", " "
    )
