"""The exposure ledger: what a run showed its model, line by line, so that it can be counted and shown again.

:meth:`ldm.data.every_dream.EveryDreamBatch.replay` shows an entry again. A leaf: runs write ledgers, data sets
replay them, and neither knows the other.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.exposure import EXPOSURE_COLUMNS


def ledger_entries(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write down the exposures of a batch.

    Args:
        batch: a batch of :class:`ldm.data.every_dream.EveryDreamBatch` or another data set of this project; its
            tensors on the CPU.

    Returns:
        A dictionary for each picture that counts (fillers do not): ``path``; ``seed``, ``epoch``, ``item`` and
        ``repeat``, which its random draws are keyed by; the ``caption`` that the model got and whether it was
        ``dropped``; ``size``, width and height of the training picture; ``crop``, left, top, right and bottom of
        what was shown in pixels of the upright picture; ``flip``; ``loss_weight``.
    """
    columns = {
        "path": batch["path"],
        **dict(zip(EXPOSURE_COLUMNS, batch["exposure"].T.tolist(), strict=True)),
        "caption": batch["caption"],
        "dropped": batch["dropped"].tolist(),
        "size": batch["training_size"].tolist(),
        "crop": batch["crop"].tolist(),
        "flip": batch["flip"].tolist(),
        "loss_weight": batch["loss_weight"].tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [entry for row in rows if (entry := dict(zip(columns, row, strict=True)))["loss_weight"] > 0]


def write_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Append entries to a ledger, a line each.

    Args:
        path: the file; made where it is missing.
        entries: dictionaries that JSON can hold.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab") as file:
        file.write(b"".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> bytes:
    # What is no text in a path is a lone surrogate in Python, whose back-slash form is also JSON's.
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """Read a ledger's entries one by one; a last line that a crash cut off is passed over.

    Args:
        path: a run's ``exposure.jsonl``.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not an entry; says which.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}; restore the file or move it away") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number}: it is no entry; restore the file or move it away")
            yield entry


def keep_entries_before(path: Path, epoch: int, batch: int) -> int:
    """Take out of a ledger what a resumed run is going to show again.

    Args:
        path: the file; nothing happens where it is missing.
        epoch: the epoch in which the run goes on.
        batch: the batch with which it goes on.

    Returns:
        How many entries were taken out.

    Raises:
        OSError: the file cannot be read or written.
    """
    if not path.exists():
        return 0
    dropped = 0
    rewritten = path.with_name(path.name + ".tmp")
    try:
        with rewritten.open("wb") as file:
            for entry in read_ledger(path):
                if (entry["run_epoch"], entry["batch"]) < (epoch, batch):
                    file.write(_line(entry))
                else:
                    dropped += 1
            file.flush()
            os.fsync(file.fileno())
        rewritten.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the one in flight is the one to show
            rewritten.unlink(missing_ok=True)
        raise
    return dropped
