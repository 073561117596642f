"""What the sampling scripts share: flags, loading a model, seeded noise, and how errors are shown."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from sampling_pictures import Description, Pixels
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

from checkpoint_files import AVERAGES, apply_averages, averaged_keys  # noqa: E402

from ldm.checkpoint import load_weights, read_weights, without_wrapper_prefixes  # noqa: E402
from ldm.diffusers_format import is_diffusers_folder, read_folder  # noqa: E402
from ldm.training.cli import Options  # noqa: E402
from ldm.training.config import load_run_config  # noqa: E402
from ldm.training.console import console  # noqa: E402
from ldm.training.run_directory import LAST_CHECKPOINT  # noqa: E402
from ldm.util import get_obj_from_str, instantiate_from_config  # noqa: E402

DEFAULT_CONFIG: Final = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
USER_ERROR: Final = 2
INTERRUPTED: Final = 130
OUT_OF_MEMORY_WORDS: Final = ("out of memory", "can't allocate memory")
SIDE: Final = 8
"""Width and height of a picture divide by this."""
LARGEST_SEED: Final = 2**63 - 1

DDIM, PLMS, DPM_SOLVER = "DDIM", "PLMS", "DPM++ 2M"
SAMPLERS: Final[Mapping[str, str]] = {
    DDIM: "ldm.models.diffusion.ddim.DDIMSampler",
    PLMS: "ldm.models.diffusion.plms.PLMSSampler",
    DPM_SOLVER: "ldm.models.diffusion.dpm_solver.DPMSolverSampler",
}
"""Samplers by the names that web UIs know."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without repeating all flags."""

    def error(self, message: str) -> NoReturn:
        """End the program with status 2."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (--help lists the flags)\n")


def build_parser(description: str | None, outdir: str) -> argparse.ArgumentParser:
    """Declare the flags of every sampling script.

    Args:
        description: what the script does, and how to call it.
        outdir: the default folder of pictures.

    Returns:
        The parser.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt", type=Path, required=True, help="checkpoint (.ckpt, .safetensors), run folder, or diffusers folder"
    )
    parser.add_argument(
        "--config", type=Path, help=f"YAML of the model (default: the run's own; else {DEFAULT_CONFIG.name})"
    )
    parser.add_argument("--no_ema", action="store_true", help="use the live weights also where averaged ones are there")
    parser.add_argument("--outdir", type=Path, default=Path(outdir), help="folder to write to (default: %(default)s)")
    parser.add_argument("--skip_grid", action="store_true", help="write no grid")
    parser.add_argument("--skip_save", action="store_true", help="write no single pictures")
    parser.add_argument("--n_rows", type=int, default=0, help="pictures in a row of the grid (default: n_samples)")
    sampler = parser.add_mutually_exclusive_group()
    sampler.add_argument("--plms", action="store_true", help="sample by PLMS, not DDIM")
    sampler.add_argument("--dpm_solver", action="store_true", help="sample by DPM-Solver++(2M); 20 steps do")
    parser.add_argument("--ddim_steps", type=int, default=50, help="steps of any sampler (default: %(default)s)")
    parser.add_argument("--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first picture (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("full", "autocast"),
        default="autocast",
        help="autocast: half precision on a GPU (default: %(default)s)",
    )
    parser.add_argument("--device", help="such as cuda, cuda:1 or cpu (default: the GPU if there is one)")
    return parser


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of text-to-image models."""
    parser.add_argument("--prompt", help="what to show")
    parser.add_argument("--from-file", type=Path, metavar="FILE", help="file of prompts, one a line")
    parser.add_argument("--negative_prompt", default="", help="what not to show")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance scale, 1 for none (default: %(default)s)")
    parser.add_argument("--n_iter", type=int, default=2, help="batches (default: %(default)s)")
    parser.add_argument("--n_samples", type=int, default=3, help="pictures in a batch (default: %(default)s)")
    parser.add_argument("--H", type=int, help="height in pixels (default: what the model was made for)")
    parser.add_argument("--W", type=int, help="width in pixels (default: what the model was made for)")
    parser.add_argument("--C", type=int, help="latent channels; must be the model's")
    parser.add_argument("--f", type=int, help="pixels a latent cell; must be the model's")
    parser.add_argument(
        "--fixed_code", action="store_true", help="use the same noise for each batch, or each prompt of a file"
    )


def sampler_name(options: argparse.Namespace) -> str:
    """Name the sampler that the flags choose."""
    return PLMS if options.plms else DPM_SOLVER if options.dpm_solver else DDIM


def check_options(options: argparse.Namespace) -> None:
    """Refuse flags that cannot be followed, before anything is read.

    Raises:
        ValueError: what is wrong, and what to type.
    """
    for name in ("n_samples", "n_iter", "batch_size"):
        if getattr(options, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is not allowed; give at least 1")
    if not 1 <= options.ddim_steps <= 1000:
        raise ValueError(f"--ddim_steps {options.ddim_steps} is not allowed; give 1 to 1000")
    if not (math.isfinite(options.ddim_eta) and 0.0 <= options.ddim_eta <= 1.0):
        raise ValueError(f"--ddim_eta {options.ddim_eta} is not allowed; give 0 to 1")
    if options.ddim_eta > 0.0 and sampler_name(options) != DDIM:
        flag = "--plms" if options.plms else "--dpm_solver"
        raise ValueError(f"{flag} adds no noise, so --ddim_eta {options.ddim_eta} cannot go with it; leave one out")
    if not math.isfinite(getattr(options, "scale", 1.0)):
        raise ValueError(f"--scale {options.scale} is not allowed; give a number")
    for name in ("H", "W"):
        pixels = getattr(options, name, None)
        if pixels is not None and (pixels < SIDE or pixels % SIDE):
            raise ValueError(f"--{name} {pixels} is not allowed; give a multiple of {SIDE}")
    if options.n_rows < 0:
        raise ValueError(f"--n_rows {options.n_rows} is not allowed; give at least 1")
    if not 0 <= options.seed <= LARGEST_SEED - 10**9:
        raise ValueError(f"--seed {options.seed} is not allowed; give 0 to {LARGEST_SEED - 10**9}")
    if not 0.0 < getattr(options, "strength", 1.0) <= 1.0:
        raise ValueError(f"--strength {options.strength} is not allowed; give more than 0, and at most 1")
    if options.skip_grid and options.skip_save:
        raise ValueError("--skip_grid and --skip_save together would write nothing; leave one out")
    choose_device(options.device)
    check_writable(options.outdir)


def choose_device(name: str | None) -> torch.device:
    """Find the device to sample on.

    Args:
        name: as torch names it; None takes the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: torch cannot use it here; give cuda, cuda:1, … or cpu") from error
    return device


def check_writable(folder: Path) -> None:
    """Find out, before anything costly is done, whether a folder can be made and written to.

    Raises:
        OSError: if not.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"--outdir {folder}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--outdir {folder}: no permission to write to {place}")


# --- what to make ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One picture to make.

    Attributes:
        prompt: what it shows.
        seed: names its noise: the seed of the run plus the picture's number.
    """

    prompt: str
    seed: int


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Read the prompts that the flags give: one, or a file's lines.

    Raises:
        OSError: the file cannot be read.
        ValueError: there is no prompt.
    """
    if options.prompt is not None and options.from_file is not None:
        raise ValueError("--prompt and --from-file cannot go together; leave one out")
    if options.prompt is not None:
        return [options.prompt]
    if options.from_file is None:
        raise ValueError("nothing to show: give --prompt TEXT, or --from-file FILE with a prompt on each line")
    try:
        lines = options.from_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--from-file {options.from_file} is not UTF-8 text; save it as such") from error
    except OSError as error:
        raise OSError(f"--from-file {options.from_file}: {error.strerror or error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--from-file {options.from_file} holds no prompt; write one on each line")
    return prompts


def plan_jobs(options: argparse.Namespace, prompts: Sequence[str]) -> list[Job]:
    """List the pictures to make: ``n_iter`` batches of one prompt, or every prompt of a file ``n_iter`` times."""
    each = list(prompts) if options.from_file is not None else [prompts[0]] * options.n_samples
    texts = each * options.n_iter
    if not options.fixed_code:
        return [Job(text, options.seed + number) for number, text in enumerate(texts)]
    # The prompts of a file are compared on one noise; batches of one prompt repeat the noise of the first.
    distinct = 1 if options.from_file is not None else options.n_samples
    return [Job(text, options.seed + number % distinct) for number, text in enumerate(texts)]


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Split a sequence into parts of a size; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class SeededNoise:
    """Standard normals for a batch, each picture's from its own generator on the CPU.

    So a picture depends on its seed alone, not on the batch or the device. The first draw, which sampling starts
    from, is what other programs draw from the same seed on the CPU.

    Args:
        seeds: one a picture.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Draw for a batch (B, ...): a tensor of its shape, dtype and device."""
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(device=like.device, dtype=like.dtype)


# --- the model ------------------------------------------------------------------------------------------------------


def find_checkpoint(path: Path, config: Path | None) -> tuple[Path, Path]:
    """Find the checkpoint and the config that ``--ckpt`` and ``--config`` mean.

    Args:
        path: a checkpoint, a run folder, or a diffusers folder.
        config: the YAML, or None for the run's own, else the default.

    Returns:
        The checkpoint's file (or diffusers folder) and the YAML's.

    Raises:
        OSError: a file is missing.
    """
    checkpoint = path
    if path.is_dir() and not is_diffusers_folder(path):
        checkpoint = (path if path.name == "checkpoints" else path / "checkpoints") / LAST_CHECKPOINT
        if not checkpoint.is_file():
            raise FileNotFoundError(f"--ckpt {path}: this folder has no checkpoints/{LAST_CHECKPOINT}; name a file")
    elif not path.exists():
        raise FileNotFoundError(f"--ckpt {path}: no such file or folder")
    if config is None:
        in_run = checkpoint.resolve().parent.name == "checkpoints"
        saved = sorted((checkpoint.resolve().parent.parent / "configs").glob("*-project.yaml")) if in_run else []
        config = saved[-1] if saved else DEFAULT_CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"--config {config}: no such file")
    return checkpoint, config


def read_model_config(path: Path) -> dict[str, Any]:
    """Read and check the ``model`` section of a YAML, for a model whose weights come from elsewhere.

    Raises:
        ValueError: the YAML is wrong; the first problem, in one line.
    """
    try:
        run_config = load_run_config(Options(base=[str(path)]))
    except ValueError as error:
        raise ValueError(f"--config {path}: {str(error).splitlines()[0]}") from error
    merged: dict[str, Any] = OmegaConf.to_container(run_config.config, resolve=True)  # type: ignore[assignment]
    section: dict[str, Any] = merged.get("model") or {}
    params = section.get("params") or {}
    if "target" not in section or not params:
        raise ValueError(f"--config {path} has no model section with target and params")
    if "unet_config" not in params:
        kind = str(section["target"]).rpartition(".")[2]
        raise ValueError(
            f"--config {path} describes {kind}, which is no diffusion model and makes no pictures of its own; "
            "name a diffusion model's checkpoint and config"
        )
    # Averages are put in the weights' place while reading, and no part loads a file of its own.
    params["use_ema"] = False
    for part in (params, *(value.get("params") for value in params.values() if isinstance(value, dict))):
        if isinstance(part, dict):
            part.pop("ckpt_path", None)
    return section


def with_averages(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Put the moving averages of the network's weights in the weights' place.

    Args:
        weights: a checkpoint's, with averages.
        source: its name, for messages.

    Returns:
        The weights, without averages beside them.

    Raises:
        ValueError: averages and weights do not pair off.
    """
    averaged = set(averaged_keys(weights, source).values())
    missing = [key for key in weights if key.startswith("model.") and key not in averaged]
    if missing:
        raise ValueError(
            f"checkpoint '{source}' lacks the moving averages of {len(missing)} weights ({missing[0]}); give --no_ema"
        )
    return apply_averages(weights, "bake", source)


def load_model(options: argparse.Namespace) -> Any:
    """Build the model and load its weights.

    Returns:
        The model on its device, in evaluation.

    Raises:
        OSError, ValueError: see :mod:`ldm.checkpoint`.
    """
    checkpoint, config = find_checkpoint(options.ckpt, options.config)
    section = read_model_config(config)
    if is_diffusers_folder(checkpoint):
        weights = read_folder(checkpoint, section["params"])
    else:
        weights = without_wrapper_prefixes(read_weights(checkpoint))
    has_averages = any(key.startswith(AVERAGES) for key in weights)
    if has_averages and not options.no_ema:
        weights = with_averages(weights, checkpoint)
    device = choose_device(options.device)
    with torch.device(device):
        model = instantiate_from_config(section, torch.nn.Module)
    report = load_weights(model, weights, source=str(checkpoint))
    print(f"{checkpoint} by {config}, on {device}")
    if has_averages:
        print(f"note: {'live' if options.no_ema else 'averaged (EMA)'} weights are used")
    for note in report.notes:
        print(f"note: {note}")
    return model.to(device).eval()


def build_sampler(model: Any, options: argparse.Namespace) -> Any:
    """Build the sampler that the flags choose, with its schedule made."""
    sampler = get_obj_from_str(SAMPLERS[sampler_name(options)])(model)
    sampler.make_schedule(options.ddim_steps, ddim_eta=options.ddim_eta, verbose=False)
    return sampler


def downsampling_factor(model: Any) -> int:
    """Give the pixels that a latent cell is wide; 1 for models on pixels."""
    first_stage = getattr(model, "first_stage_model", None)
    return 1 if first_stage is None else int(first_stage.downsampling_factor)


def check_text_model(model: Any, options: argparse.Namespace) -> None:
    """Refuse a model that is not one from text to latents, or not of the shape that the flags say.

    Raises:
        ValueError: what differs.
    """
    if getattr(model, "cond_stage_model", None) is None or model.cond_stage_key not in ("txt", "caption"):
        raise ValueError(f"--ckpt {options.ckpt} is no text-to-image model; use scripts/sample_diffusion.py")
    for flag, given, own in (("C", options.C, model.channels), ("f", options.f, downsampling_factor(model))):
        if given is not None and given != own:
            raise ValueError(f"--{flag} {given} does not fit the model, where it is {own}; leave it out")


def picture_size(model: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Give width and height in pixels, the model's own where they are not given.

    Raises:
        ValueError: they do not divide by the pixels of a latent cell.
    """
    factor = downsampling_factor(model)
    own = model.image_size
    own_height, own_width = (own, own) if isinstance(own, int) else own
    size = (width or own_width * factor, height or own_height * factor)
    if any(pixels % factor for pixels in size):
        raise ValueError(f"a size of {size[0]}x{size[1]} is not allowed; this model needs multiples of {factor}")
    return size


def half_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Make the context that sampling runs in: autocast on a GPU, nothing on a CPU, where it gains nothing."""
    return torch.autocast(device.type) if precision == "autocast" and device.type == "cuda" else nullcontext()


@torch.no_grad()
def sample_text(
    model: Any,
    sampler: Any,
    options: argparse.Namespace,
    jobs: Sequence[Job],
    noise: SeededNoise,
    x: Tensor,
    steps: int,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
) -> list[Pixels]:
    """Make the pictures of a batch of prompts.

    Args:
        model: a text-to-image model.
        sampler: from :func:`build_sampler`.
        options: the flags.
        jobs: the B pictures.
        noise: their noise.
        x: (B, C, h, w), noisy latents to begin from.
        steps: steps to go; all of the schedule's where x is pure noise.
        mask: 1 where ``x0`` is to be kept, broadcast against x.
        x0: the latents to keep there.

    Returns:
        B pictures.
    """
    with half_precision(x.device, options.precision):
        cond = model.get_learned_conditioning([job.prompt for job in jobs])
        uncond = None
        if options.scale != 1.0:
            uncond = model.get_learned_conditioning([options.negative_prompt] * len(jobs))
        latents = sampler.decode(
            x,
            cond,
            steps,
            unconditional_guidance_scale=options.scale,
            unconditional_conditioning=uncond,
            mask=mask,
            x0=x0,
            noise_source=noise,
            verbose=True,
        )
        return decode_pictures(model, latents)


@torch.no_grad()
def decode_pictures(model: Any, latents: Tensor) -> list[Pixels]:
    """Decode latents (B, C, h, w) one by one, for a batch would need much memory.

    Raises:
        ValueError: a picture came out as NaN.
    """
    pictures = []
    for latent in latents.split(1):
        pixels = model.decode_first_stage(latent) if hasattr(model, "decode_first_stage") else latent
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("a picture came out as NaN: half precision overflows in this model; give --precision full")
        pictures.append(to_pixels(pixels[0]))
    return pictures


def to_pixels(picture: Tensor) -> Pixels:
    """Turn a picture (3 or 1, H, W) in [-1, 1] into pixels."""
    scaled = ((picture.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()


@torch.no_grad()
def encode_picture(model: Any, picture: Image.Image, options: argparse.Namespace, noise: SeededNoise) -> Tensor:
    """Encode one picture for a batch.

    Args:
        model: the model.
        picture: RGB.
        options: the flags.
        noise: the batch's; the latents are drawn from the encoder's distribution.

    Returns:
        (B, C, h, w), one draw for each picture of the batch.
    """
    device = model.betas.device
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)[None]
    with half_precision(device, options.precision):
        posterior = model.encode_first_stage(pixels.to(device))
        mode = posterior.mode() if hasattr(posterior, "mode") else posterior
        # A first stage without a distribution, such as a quantised one, has but one answer.
        batch = mode.float().expand(len(noise.generators), -1, -1, -1)
        if mode is posterior:
            return model.get_first_stage_encoding(batch)
        return model.get_first_stage_encoding(posterior, noise(batch)).float()


def describe(options: argparse.Namespace, job: Job, size: tuple[int, int], **more: Any) -> Description:
    """Describe a picture of a text-to-image script: the flags, its size in pixels, and more by name."""
    settings: dict[str, Any] = {
        "Steps": options.ddim_steps,
        "Sampler": sampler_name(options),
        "CFG scale": f"{options.scale:g}",
        "Size": f"{size[0]}x{size[1]}",
        "Model": model_name(options.ckpt),
    }
    if options.ddim_eta > 0:
        settings["Eta"] = f"{options.ddim_eta:g}"
    return Description(job.prompt, options.negative_prompt, job.seed, settings | more)


def model_name(checkpoint: Path) -> str:
    """Name a model for a picture's metadata: the run folder's name, or the file's without ending."""
    path = checkpoint.resolve()
    return path.name if path.is_dir() else path.stem


# --- running --------------------------------------------------------------------------------------------------------


def run(work: Callable[[argparse.Namespace], None], options: argparse.Namespace, prog: str) -> int:
    """Do a script's work, and word what the user can put right as one line.

    Args:
        work: the work.
        options: the flags.
        prog: the script's name.

    Returns:
        The exit status: 0; 2 where the user can put something right; 130 after Ctrl-C.
    """

    def say(message: str) -> None:
        print(f"{prog}: error: {message}", file=sys.stderr)

    try:
        with console(0, False):
            work(options)
    except KeyboardInterrupt:
        say("stopped; what is written is whole")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        say(" ".join(str(error).split("\n")))
        return USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)):
            raise
        first = next(iter(str(error).splitlines()), "")
        say(f"out of memory: make fewer pictures together, or smaller ones ({first[:120]})")
        return USER_ERROR
    return 0
