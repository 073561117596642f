"""Make the tiny checkpoint that the quickstart and the tests start from: random weights, always the same ones.

python scripts/make_tiny_checkpoint.py [--config FILE] [--out FILE] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from ldm.util import instantiate_from_config  # noqa: E402

DEFAULT_CONFIG = ROOT / "configs" / "stable-diffusion" / "v1-finetune_tiny.yaml"
DEFAULT_OUT = ROOT / "models" / "tiny" / "tiny_random.ckpt"


def make_tiny_checkpoint(config: Path, out: Path, seed: int) -> int:
    """Build the model that a config describes with random weights, and save it.

    Args:
        config: YAML with a ``model`` section.
        out: checkpoint to write; it holds ``state_dict`` and ``global_step``.
        seed: of the random weights.

    Returns:
        The number of parameters.
    """
    torch.manual_seed(seed)
    section: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(config).model, resolve=True)  # type: ignore[assignment]
    model = instantiate_from_config(section, torch.nn.Module)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    torch.save({"state_dict": model.state_dict(), "global_step": 0}, unfinished)
    unfinished.replace(out)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML that describes the model")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()
    count = make_tiny_checkpoint(options.config, options.out, options.seed)
    print(f"{options.out}: {count / 1e6:.1f} million random weights, {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
