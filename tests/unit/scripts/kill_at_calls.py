"""Kill runs of the toy before and after each kind of call to the disk, and continue them; writes down what came of it.

Started by test_kill_and_resume.py as a process of its own: it forks, which a process that has used a GPU cannot do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from kill_and_resume import CALLS, Board, KillingDisk, Strike
from verify_resume import compare

from ldm.checkpoint import read_checkpoint
from ldm.training.checkpoint_io import remove_leftovers
from ldm.training.recovery import newest_valid_checkpoint
from tests.unit.training.toy import make_pictures
from tests.unit.training.toy_run import prepare_toy_run

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
SAVING: dict[str, Any] = {"modelcheckpoint": {"params": {"every_n_train_steps": 2, "save_top_k": 1}}}


def train(folder: Path, pictures: Path, disk: KillingDisk) -> None:
    """Train the toy, from its newest checkpoint if there is one."""
    checkpoints = folder / "checkpoints"
    checkpoint = newest_valid_checkpoint(checkpoints / "last.ckpt") if any(checkpoints.glob("*.ckpt")) else None
    remove_leftovers(checkpoints)
    run, data = prepare_toy_run(folder, pictures, max_epochs=2, lightning=SAVING)
    run.trainer.strategy.checkpoint_io.disk = disk  # type: ignore[attr-defined]
    run.trainer.fit(run.model, datamodule=data, ckpt_path=checkpoint)


def train_apart(folder: Path, pictures: Path, strike: Strike | None) -> int:
    """Train in a process of its own; gives its exit status, or the negative number of its signal."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        train(folder, pictures, KillingDisk(Board(), strike))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """Read what a run has left."""
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    return {
        "names": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        **{key: last[key] for key in PARTS},
    }


def main(place: Path) -> None:
    """Do it."""
    torch.set_num_threads(1)
    pictures = make_pictures(place / "pictures")
    counting = KillingDisk(Board(), None)
    train(place / "unbroken", pictures, counting)
    whole = content(place / "unbroken")
    outcomes: dict[str, Any] = {}
    for call in CALLS:
        for after in (False, True):
            folder = place / f"{call} {after}"
            strike = Strike("call", call, counting.asked[call] // 2 + 1, after)
            statuses = [train_apart(folder, pictures, strike), train_apart(folder, pictures, None)]
            result = compare("run", whole, content(folder))
            outcomes[f"{'after' if after else 'before'} {call}"] = [*statuses, result.difference, result.problem]
    (place / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
