"""Prove on this machine that a run which was broken off and continued equals one that was not.

python scripts/verify_resume.py [--base YAML ...] [--steps N] [--breaks N] [--seed N] [--keep DIR] [words for main.py]

Trains twice with the same command: once unbroken, once ended at random steps (in turn killed without warning, and
asked to stop) and continued with -r. Then weights, moving averages, the optimiser's state, learning rates, counters,
the exposures in their order, validation values and the checkpoints' names are compared. Without --base a tiny model
is trained on pictures made for it, within two minutes on a CPU.

Exit status: 0 all is the same, 1 something differs, 2 it could not be tried.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from checkpoint_files import ROOT, report_errors
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ldm.checkpoint import read_checkpoint
from ldm.ledger import read_ledger
from ldm.training.progress import format_duration

TINY: Final = ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
TINY_WORDS: Final = (
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.size=32",
    "data.params.train.params.repeats=2",
    "data.params.train.params.flip_p=0.5",
    "data.params.train.params.conditional_dropout=0.2",
    "data.params.validation.params.size=32",
    "model.params.use_ema=true",
    "model.params.unet_config.params.channel_mult=[1,2]",
    "model.params.unet_config.params.attention_resolutions=[2]",
    "model.params.unet_config.params.context_dim=32",
    "model.params.cond_stage_config.params.text_config.hidden_size=32",
    "model.params.cond_stage_config.params.text_config.intermediate_size=64",
    "model.params.cond_stage_config.params.text_config.projection_dim=32",
    "lightning.callbacks.image_logger.params.disabled=true",
    "--max_epochs=99",
)
SHAPES: Final = ((48, 48), (48, 48), (64, 32), (64, 32), (48, 48), (32, 64))
EPOCH_AND_STEP: Final = "epoch and step"
LEDGER: Final = "exposure.jsonl"
POLL_SECONDS: Final = 0.005
SHOWN_LINES: Final = 15


@dataclass(frozen=True)
class Result:
    """What was compared, and what came of it.

    Attributes:
        what: in words.
        count: how many things were compared.
        difference: the largest difference of two numbers; 0 where all are the same.
        problem: what cannot be told by a number, or None.
    """

    what: str
    count: int
    difference: float = 0.0
    problem: str | None = None

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return self.problem is None and self.difference == 0


def compare_runs(unbroken: Path, broken: Path) -> list[Result]:
    """Compare what two runs have left.

    Args:
        unbroken: the run folder of the one.
        broken: that of the other.

    Returns:
        A result for each part.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """
    one, two = (read_checkpoint(str(run / "checkpoints" / "last.ckpt")) for run in (unbroken, broken))
    weights = [_split_averages(content["state_dict"]) for content in (one, two)]
    results = [
        compare("weights", weights[0][0], weights[1][0]),
        compare("moving averages", weights[0][1], weights[1][1]),
        compare("optimiser state", one["optimizer_states"], two["optimizer_states"]),
        compare("learning rates", _rates(one), _rates(two)),
        compare(EPOCH_AND_STEP, [one["epoch"], one["global_step"]], [two["epoch"], two["global_step"]]),
        compare("exposures", _ledgers(unbroken), _ledgers(broken)),
        _compare_curves(_curves(unbroken), _curves(broken)),
        compare("checkpoint names", _names(unbroken), _names(broken)),
    ]
    return [result for result in results if result.count or result.problem]


def compare(what: str, one: Any, two: Any) -> Result:
    """Compare two nests of containers value by value.

    Args:
        what: what they are.
        one: mappings, lists, tensors, numbers, texts.
        two: the same.

    Returns:
        The largest difference, or the first place where no difference can be told.
    """
    left, right = dict(_flat(one)), dict(_flat(two))
    if list(left) != list(right):
        odd = next((key for key in [*left, *right] if (key in left) != (key in right)), None)
        where = f"{odd} is only in the {'unbroken' if odd in left else 'broken'} run" if odd else "another order"
        return Result(what, len(left), math.inf, where)
    largest, place = 0.0, ""
    for key, value in left.items():
        difference = _difference(value, right[key])
        if difference > largest:
            largest, place = difference, key
    problem = None
    if largest:
        shown = "" if isinstance(left[place], Tensor) else f": {left[place]} and {right[place]}"
        problem = f"most at {place}{shown}"
    return Result(what, len(left), largest, problem)


def format_results(results: Sequence[Result]) -> str:
    """Write results as a table."""
    rows = [(f"{result.what} ({result.count:,})", _verdict(result)) for result in results]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {verdict}" for name, verdict in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Try it; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other words go to main.py, such as --data_root, --gpus 0, --deterministic true.",
        allow_abbrev=False,
    )
    parser.add_argument("-b", "--base", nargs="+", default=[], metavar="YAML", help="config (default: a tiny model)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimiser steps of the run (default: 10)")
    parser.add_argument("--save_every", type=int, metavar="N", help="steps between checkpoints (default: a third)")
    parser.add_argument("--breaks", type=int, default=2, metavar="N", help="how often the run is ended (default: 2)")
    parser.add_argument("--seed", type=int, metavar="N", help="where it is ended (default: drawn)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep both runs here (default: they are deleted)")
    options, words = parser.parse_known_args(argv)
    if options.steps < 4 or not 1 <= options.breaks <= options.steps - 3:
        parser.error("give --steps 4 or more, and --breaks from 1 to three less")

    def work() -> int:
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            return verify(options.keep, options, words)
        with tempfile.TemporaryDirectory(prefix="verify_resume") as folder:
            return verify(Path(folder), options, words)

    return report_errors("verify_resume", work)


def verify(folder: Path, options: argparse.Namespace, words: Sequence[str]) -> int:
    """Train both runs and compare them.

    Args:
        folder: an empty folder.
        options: what the command line says.
        words: what goes to main.py.

    Returns:
        0 if all is the same, else 1.

    Raises:
        OSError: a run failed, or ended otherwise than it should.
    """
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    save_every = options.save_every or max(1, options.steps // 3)
    steps = sorted(random.Random(seed).sample(range(2, options.steps), options.breaks))
    command = _command(folder, options, words, save_every)
    print(f"{options.steps} steps, a checkpoint every {save_every}; --seed {seed} repeats this", flush=True)

    began = time.monotonic()
    unbroken = Trial(folder, "unbroken")
    unbroken.train(command)
    print(f"unbroken run: {format_duration(time.monotonic() - began)}", flush=True)

    began = time.monotonic()
    broken = Trial(folder, "broken")
    for number, step in enumerate(steps):
        by = signal.SIGTERM if number % 2 or sys.platform == "win32" else signal.SIGKILL
        reached = broken.train(command, break_at=step, by=by)
        if reached is not None:
            print(f"broken run: {'killed' if by != signal.SIGTERM else 'stopped'} at step {reached}", flush=True)
    broken.train(command)
    print(f"broken run: continued to its end: {format_duration(time.monotonic() - began)}\n", flush=True)

    results = compare_runs(unbroken.run, broken.run)
    print(format_results(results))
    if all(result.is_same for result in results):
        print("\nThe continued run equals the unbroken one: the largest difference is 0.")
        return 0
    print("\nThe continued run differs from the unbroken one.")
    if "gpu" in " ".join(words) and "--deterministic" not in " ".join(words):
        print("GPUs add in an order of their own: try again with --deterministic true.")
    return 1


class Trial:
    """One run, in as many processes as it takes.

    Args:
        folder: where its log folder goes.
        name: the log folder's name.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.logdir = folder / name
        self.output = folder / f"{name}.log"

    @property
    def run(self) -> Path:
        """The run's folder."""
        found = sorted(self.logdir.iterdir()) if self.logdir.is_dir() else []
        if not found:
            raise FileNotFoundError(f"the run made no folder in {self.logdir}; {self._end_of_output()}")
        return found[0]

    def train(
        self, command: Sequence[str], break_at: int | None = None, by: signal.Signals | None = None
    ) -> int | None:
        """Begin the run, or continue it, until its end or a break.

        Args:
            command: begins it.
            break_at: the step at which the process gets a signal, once there is a checkpoint to continue from.
            by: the signal.

        Returns:
            The step at which it was broken off; None if it came to its end.

        Raises:
            OSError: it failed.
        """
        begun = self.logdir.is_dir()
        words = ["-t", "-r", str(self.run)] if begun else [*command, "-l", str(self.logdir)]
        before = self._ledger_number() if begun else 0
        with self.output.open("ab") as output:
            process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *words], stdout=output, stderr=output)
            try:
                reached = None if break_at is None else self._wait_for(process, break_at, before)
                if reached is not None and by is not None:
                    process.send_signal(by)
                status = process.wait()
            finally:
                if process.poll() is None:  # Ctrl-C ends this script and what it has started
                    process.kill()
                    process.wait()
        if status == 0:
            return None
        if reached is None or by is None or status not in (-by, 128 + by, 1 if sys.platform == "win32" else -by):
            raise OSError(f"main.py ended with exit status {status}; {self._end_of_output()}")
        return reached

    def _wait_for(self, process: subprocess.Popen[bytes], step: int, before: int) -> int | None:
        """Wait until a step is done and there is a checkpoint; None if the process ends first."""
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            # Until training begins, a continued run's ledger is still the one of the process before.
            if not self._ledger_number() or self._ledger_number() == before:
                continue
            reached = max((int(entry["step"]) for entry in read_ledger(self.run / LEDGER)), default=0)
            if reached >= step and (self.run / "checkpoints" / "last.ckpt").is_file():
                return reached
        return None

    def _ledger_number(self) -> int:
        """Give the number of the ledger's file in the file system; 0 if it is not there."""
        try:
            return (self.run / LEDGER).stat().st_ino
        except OSError:
            return 0

    def _end_of_output(self) -> str:
        """Give the last lines that the run wrote."""
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.is_file() else ""
        return "it wrote last:\n" + "\n".join(text.splitlines()[-SHOWN_LINES:])


def _command(folder: Path, options: argparse.Namespace, words: Sequence[str], save_every: int) -> list[str]:
    """Build the words for main.py that begin a run."""
    base = options.base or [str(TINY)]
    own = []
    if not options.base:
        make_pictures(folder / "pictures")
        own = ["--data_root", str(folder / "pictures"), *TINY_WORDS]
    modelcheckpoint = "lightning.modelcheckpoint.params"
    saving = [f"{modelcheckpoint}.every_n_train_steps={save_every}", f"{modelcheckpoint}.every_n_epochs=null"]
    ledger = ["lightning.callbacks.exposure_ledger.params.enabled=true", "lightning.trainer.log_every_n_steps=1"]
    limits = ["--max_steps", str(options.steps), "--no-test"]
    return ["--base", *base, "-t", "-n", "verify", *own, *saving, *ledger, *limits, *words]


def make_pictures(folder: Path) -> None:
    """Draw a few pictures of several shapes."""
    for number, size in enumerate(SHAPES):
        path = folder / f"kind {number % 2}" / f"a slope {number}_.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(60 * number).resize(size).convert("RGB").save(path)


def _split_averages(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part weights and moving averages."""
    averages = {key: value for key, value in weights.items() if key.startswith("model_ema.")}
    return {key: value for key, value in weights.items() if key not in averages}, averages


def _rates(content: Mapping[str, Any]) -> list[Any]:
    """Take the learning rates out of a checkpoint, and the state of their schedules."""
    groups = [group for optimizer in content["optimizer_states"] for group in optimizer["param_groups"]]
    rates = [{name: group[name] for name in ("lr", "initial_lr") if name in group} for group in groups]
    return [rates, content["lr_schedulers"]]


def _ledgers(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Read every device's exposures."""
    return {path.name: list(read_ledger(path)) for path in sorted(run.glob("exposure*.jsonl"))}


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _curves(run: Path) -> dict[str, float]:
    """Read what was validated, by name and step."""
    # It tells of points that a continued run takes back, as it should.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("val")]
    return {f"{name} at step {event.step}": event.value for name in names for event in events.Scalars(name)}


def _compare_curves(one: Mapping[str, float], two: Mapping[str, float]) -> Result:
    """Compare validation values; those that a killed process had not written yet are not there."""
    common = [key for key in one if key in two]
    extra = next((key for key in two if key not in one), None)
    if extra is not None:
        return Result("validation values", len(common), math.inf, f"{extra} is only in the broken run")
    if one and not common:
        return Result("validation values", 0, math.inf, "the broken run has none")
    return compare("validation values", {key: one[key] for key in common}, {key: two[key] for key in common})


def _flat(value: Any, place: str = "") -> list[tuple[str, Any]]:
    """List the values inside a nest of containers with their places."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{place}.{key}" if place else str(key))]
    if isinstance(value, (list, tuple)):
        return [pair for number, item in enumerate(value) for pair in _flat(item, f"{place}[{number}]")]
    return [(place, value)]


def _difference(one: Any, two: Any) -> float:
    """Give the largest difference of two values; infinite where it is none of numbers."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return math.inf
        if one.numel() == 0 or one.equal(two):
            return 0.0
        apart = (one.double() - two.double()).abs()
        apart[one.isnan() & two.isnan()] = 0.0
        return float(apart.nan_to_num(nan=math.inf).max())
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return math.inf
    if one == two or (one != one and two != two):
        return 0.0
    both_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, two))
    return abs(float(one) - float(two)) if both_numbers and math.isfinite(one - two) else math.inf


def _verdict(result: Result) -> str:
    """Say what came of a comparison."""
    if result.is_same:
        return "0"
    size = "" if math.isinf(result.difference) else f"{result.difference:.3g}"
    return " ".join(part for part in ("DIFFERENT", size, f"({result.problem})" if result.problem else "") if part)


if __name__ == "__main__":
    sys.exit(main())
