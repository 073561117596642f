"""What has changed between a checkpoint's save and its resume, and whether a run can still go on as if unbroken."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import yaml

from ldm.optimizers import DEFAULT_TARGET, SECTION
from ldm.training.cli import trainer_parameters
from ldm.training.config_check import accepted_by
from ldm.training.config_tree import leaves
from ldm.training.data_record import described_set
from ldm.training.run_record import plain, read_record

logger = logging.getLogger(__name__)

NAMED: Final = 3
"""How many of the files that changed in one way are named."""

LONGEST_VALUE: Final = 60
"""Characters of a value that are shown."""

UNSAID: Final = re.compile(r"run\.(?!seed$|scale_lr$)|lightning\.trainer\.default_root_dir$")
"""Settings that name a run, or stand elsewhere too: nobody needs to be told."""

HARMLESS: Final = re.compile(
    r"lightning\.(logger|modelcheckpoint|find_unused_parameters)\b"
    r"|lightning\.callbacks\.(image_logger|learning_rate_logger|cuda_callback|exposure_ledger)\b"
    r"|data\.params\.(num_workers|test|predict)\b"
    # Where the data lies; whether it is the same is seen in the files.
    r"|data\.params\.(train|validation)\.params\.(sets\.[^.]+\.params\.)?"
    r"(data_root|shards|on_bad_image|cache_dir|shard_cache_dir|shard_cache_gib)$"
    # Read once before the run began, or the same numbers by another way.
    r"|model\.params\.(monitor|log_every_t|ckpt_path|ignore_keys|ema_device)$"
    r"|model\.params\.\w+\.params\.(use_checkpoint|ckpt_path|monitor)$"
)
"""Settings that change neither what a run shows its model nor what that learns from it, nor what is validated."""

TRAINER_BREAKS: Final = re.compile(
    r"lightning\.trainer\.(accumulate_grad_batches|gradient_clip_val|gradient_clip_algorithm|precision"
    r"|limit_train_batches|overfit_batches|sync_batchnorm|plugins)\b"
)
"""Of the trainer's settings those that are not as harmless as the others: limits, devices, logging."""

LENGTHS: Final = ("lightning.trainer.max_epochs", "lightning.trainer.max_steps")
"""What a run may be made longer by, unless its learning rates decay over its whole length."""

SHARED_OUT: Final = ("data.params.batch_size", "lightning.trainer.devices", "lightning.trainer.num_nodes")
"""What says together how many pictures an optimiser step's share takes; that number counts."""

PRECISIONS: Final = {None: "32-true", 32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed"}


@dataclass
class Changes:
    """What has changed since a checkpoint was saved.

    Attributes:
        breaking: what keeps the run from being the one that it would have been, a line for each kind.
        harmless: what does not.
    """

    breaking: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """All of it."""
        return [*self.breaking, *self.harmless]


def find_changes(
    run: Path, checkpoint: Path, config: Mapping[str, Any], data: Mapping[str, Any], devices: int
) -> Changes:
    """Compare a run that is to be continued with what it was when its checkpoint was saved.

    Args:
        run: the run's folder.
        checkpoint: the checkpoint to continue from.
        config: the merged configuration now, as plain containers.
        data: what the data sets hold now, from :func:`ldm.training.data_record.describe_data`.
        devices: devices now, of all nodes.

    Returns:
        The changes. Of runs without a record the saved configuration alone is compared.
    """
    changes = Changes()
    try:
        record = read_record(run)
    except ValueError as error:
        logger.warning("%s: changes of the data since the save cannot be told", error)
        record = None
    if record is None:
        saved = _saved_config(run)
        if saved is not None:
            _compare_configs(saved, config, devices, devices, changes)
        return changes
    session = session_of(record, checkpoint)
    _compare_configs(session["config"], config, session["device"].get("devices", devices), devices, changes)
    then = record["data_sets"].get(session["data"])
    if isinstance(then, dict) and isinstance(then.get("sets"), dict):
        _compare_data(then, data, changes)
    return changes


def session_of(record: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """Find the session of a run that saved a checkpoint: the last that had begun by then.

    Args:
        record: the run's record.
        checkpoint: the file.

    Returns:
        An entry of the record's ``sessions``.
    """
    saved = checkpoint.stat().st_mtime
    sessions: Sequence[Mapping[str, Any]] = record["sessions"]
    begun = [session for session in sessions if _began(session) <= saved]
    return begun[-1] if begun else sessions[0]


def question(changes: Changes, command: str) -> str:
    """Word why a run is not continued without being told to.

    Args:
        changes: with something in ``breaking``.
        command: the command that continues it all the same.

    Returns:
        A line for each change, then what to do.
    """
    told = [f"changed since the checkpoint was saved: {line}" for line in changes.breaking]
    remedy = (
        "the run would no longer be the one that it would have been without the break: put that back as it was, "
        f"or accept it with {command}"
    )
    return "\n".join([*told, remedy])


def _began(session: Mapping[str, Any]) -> float:
    """Read when a session began; one that does not say it began first."""
    try:
        return datetime.fromisoformat(str(session["began"])).timestamp()
    except ValueError:
        return 0.0


def _saved_config(run: Path) -> dict[str, Any] | None:
    """Read the newest configuration that a run without a record has saved."""
    files = sorted((run / "configs").glob("*-project.yaml"), key=lambda file: file.name)
    if not files or files[-1].with_name(files[-1].name.replace("-project", "-lightning")).is_file():
        return None  # one of 2022, in other words
    try:
        saved = yaml.safe_load(files[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # whoever reads the configuration to continue with says so
    is_ours = isinstance(saved, dict) and all(isinstance(saved.get(part), dict) for part in ("run", "data", "model"))
    return saved if is_ours else None


# --- configurations ----------------------------------------------------------------------------------------


def _compare_configs(
    then: Mapping[str, Any], now: Mapping[str, Any], devices_then: int, devices_now: int, changes: Changes
) -> None:
    """Compare settings, those that are missing by their defaults."""
    before, after = (dict(leaves(plain(config))) for config in (then, now))
    _compare_batches(before, after, devices_then, devices_now, changes)
    spans = _spans_run(then) or _spans_run(now)
    seeds = (before.get("run.seed"), after.get("run.seed"))
    other_optimizer = len({_value(settings, f"{SECTION}.target", {}) for settings in (before, after)}) > 1
    for path in dict.fromkeys([*before, *after]):
        if path in SHARED_OUT or UNSAID.match(path):
            continue
        if other_optimizer and path.startswith(f"{SECTION}.params."):
            continue  # the target says it all
        old, new = (_value(leaf, path, config) for leaf, config in ((before, then), (after, now)))
        if old == new or (old in ({}, None) and new in ({}, None)):
            continue
        if path != "run.seed" and path.endswith(".seed") and (old, new) == seeds:
            continue  # said once
        line = f"{_name(path)} {_show(old)} -> {_show(new)}"
        is_trainers = path.startswith("lightning.trainer.")
        harmless = not TRAINER_BREAKS.match(path) if is_trainers else HARMLESS.match(path) is not None
        if path in LENGTHS and spans:
            harmless = False
            line += " (the learning rates decay over the length of the run: scheduler_config has no max_decay_steps)"
        (changes.harmless if harmless else changes.breaking).append(line)


def _spans_run(config: Mapping[str, Any]) -> bool:
    """Tell whether a learning-rate schedule ends where the run does."""
    node = ((config.get("model") or {}).get("params") or {}).get("scheduler_config") or {}
    if "target" not in node or (node.get("params") or {}).get("max_decay_steps") is not None:
        return False
    try:
        parameter = accepted_by(str(node["target"])).parameters.get("max_decay_steps")
    except ValueError:
        return False
    return parameter is not None and not parameter.required


def _compare_batches(
    before: Mapping[str, Any], after: Mapping[str, Any], devices_then: int, devices_now: int, changes: Changes
) -> None:
    """Compare how many pictures all devices take at once."""
    sizes = [settings.get("data.params.batch_size") for settings in (before, after)]
    shares = list(zip(sizes, (devices_then, devices_now), strict=True))
    if shares[0] == shares[1] or not all(isinstance(size, int) for size in sizes):
        return
    then, now = (size * devices for size, devices in shares)  # type: ignore[operator]
    words = [f"{size} x {devices}" for size, devices in shares]
    if then == now:
        changes.harmless.append(f"batch size x devices {words[0]} -> {words[1]}, {then} pictures as before")
    else:
        changes.breaking.append(f"batch size x devices {words[0]} -> {words[1]} (data.params.batch_size)")


def _value(settings: Mapping[str, Any], path: str, config: Mapping[str, Any]) -> Any:
    """Read a setting, or the default of one that is not there."""
    value = settings[path] if path in settings else _default(config, path)
    if path == f"{SECTION}.target" and value is None:
        return DEFAULT_TARGET
    return PRECISIONS.get(value, value) if path == "lightning.trainer.precision" else value


def _default(config: Mapping[str, Any], path: str) -> Any:
    """Read what a setting that is not given is by default; None where that is not known."""
    *parents, name = path.split(".")
    if parents == ["lightning", "trainer"]:
        parameter = trainer_parameters().get(name)
        return None if parameter is None else plain(parameter.default)
    node: Any = config
    for key in parents[:-1]:
        node = node.get(key) if isinstance(node, Mapping) else None
    if not parents or parents[-1] != "params" or not isinstance(node, Mapping) or "target" not in node:
        return None
    try:
        parameter = accepted_by(str(node["target"])).parameters.get(name)
    except ValueError:
        return None
    return None if parameter is None or parameter.required else plain(parameter.default)


def _name(path: str) -> str:
    """Name a setting in the words of whoever set it."""
    return {"model.base_learning_rate": "learning rate", "run.seed": "seed"}.get(path, path)


def _show(value: Any) -> str:
    """Write a value as YAML does, a long one cut."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", f"{value:g}")
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


# --- data --------------------------------------------------------------------------------------------------


def _compare_data(then: Mapping[str, Any], now: Mapping[str, Any], changes: Changes) -> None:
    """Compare data sets; what has changed in several alike is told once."""
    if then.get("digest") == now.get("digest"):
        return
    told: dict[str, list[str]] = {}
    for name in dict.fromkeys([*then["sets"], *now["sets"]]):
        if name in ("test", "predict"):
            continue
        old, new = described_set(then, name), described_set(now, name)
        line = _compare_sets(old, new)
        if line:
            told.setdefault(line, []).append(name)
    changes.breaking += [f"{line} (data: {' and '.join(names)})" for line, names in told.items()]


def _compare_sets(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    """Say what has changed of a data set, in one line; None for nothing."""
    if then is None or now is None:
        return None  # the configuration, too, has one more set or one less
    files = next((kind for kind in ("pictures", "shards") if kind in then and kind in now), None)
    if files is None:
        same = {key: value for key, value in then.items() if key != "root"} == dict(now)
        return None if same else "another kind of data set, or one of another length"
    noun = files.removesuffix("s")
    old, new = then[files], now[files]
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    both = [name for name in new if name in old]
    captions = [name for name in both if old[name].get("caption") != new[name].get("caption")]
    changed = [name for name in both if not _same_file(old[name], new[name])]
    renamed, recaptioned = _renamings(old, new, removed, added)
    for before, after in [*renamed, *recaptioned]:
        removed.remove(before)
        added.remove(after)
    arrows = [f"{before} -> {after}" for before, after in recaptioned]
    settings = [folder for folder in {**_settings(then), **_settings(now)} if _differs(then, now, folder)]
    parts = [
        _count(added, noun, "added"),
        _count(removed, noun, "removed"),
        _count([f"{before} -> {after}" for before, after in renamed], noun, "renamed"),
        _count([*captions, *arrows], "caption", "changed"),
        _count(changed, noun, "changed"),
        _count(settings, "folder's settings", "changed", "folders' settings"),
    ]
    return ", ".join(part for part in parts if part) or None


def _same_file(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether a file is the same, by its content where both times it was read."""
    if then["hash"] is not None and now["hash"] is not None:
        return bool(then["hash"] == now["hash"])
    return (then["bytes"], then["time"]) == (now["bytes"], now["time"])


def _renamings(
    old: Mapping[str, Any], new: Mapping[str, Any], removed: Iterable[str], added: Iterable[str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Find files that have another name now: the caption may stand in it.

    Returns:
        Old and new names of those with the same caption, and of those with another.
    """
    by_content: dict[str, list[str]] = {}
    for name in removed:
        if old[name]["hash"] is not None:
            by_content.setdefault(old[name]["hash"], []).append(name)
    renamed: list[tuple[str, str]] = []
    recaptioned: list[tuple[str, str]] = []
    for name in added:
        before = by_content.get(new[name]["hash"] or "")
        if before:
            pair = (before.pop(0), name)
            is_same = old[pair[0]].get("caption") == new[name].get("caption")
            (renamed if is_same else recaptioned).append(pair)
    return renamed, recaptioned


def _settings(described: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = described.get("settings", {})
    return found


def _differs(then: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> bool:
    return bool(_settings(then).get(folder, {}) != _settings(now).get(folder, {}))


def _count(names: Sequence[str], noun: str, what: str, plural: str | None = None) -> str:
    """Write ``2 captions changed: a, b``; empty for none."""
    if not names:
        return ""
    nouns = noun if len(names) == 1 else plural or f"{noun}s"
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{len(names):,} {nouns} {what} [{'; '.join(names[:NAMED])}{more}]"
