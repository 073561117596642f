"""Time the making of pictures from text, beside the same work built from diffusers' parts.

    python scripts/benchmark_sampling.py                    # 50 DDIM steps, batch 4, 512x512, bf16, guidance 7.5
    python scripts/benchmark_sampling.py --precision autocast --rounds 5

Weights are random. A run encodes prompts and negative prompts, samples, decodes the latents and fetches the pictures.
Every measurement is a process of its own, so that each side's peak memory is its own, and sides take turns, so that a
card that grows warm slows both. The table stands last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG: Final = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
OURS: Final = "ours"
DIFFUSERS: Final = "diffusers"
GIB: Final = 2**30
PROMPT: Final = "a photo of a red motorcycle parked in a garage"
NEGATIVE_PROMPT: Final = "blurry"
COLUMNS: Final = ("", "images/s", "s/batch", "steps/s", "sampling s", "decoding s", "peak GiB")


def build_parser() -> argparse.ArgumentParser:
    """Declare the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--no_peer", action="store_true", help="time our side alone")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures made together (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance scale (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("bf16", "autocast", "full"),
        default="bf16",
        help="weights in bfloat16, float32 weights under bfloat16 autocast, or float32 (default: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the UNet and the VAE's decoder, on both sides")
    parser.add_argument("--channels_last", action="store_true", help="lay the weights out so, on both sides")
    parser.add_argument("--runs", type=int, default=3, help="batches timed in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="times each side is measured (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--measure", choices=(OURS, DIFFUSERS), help=argparse.SUPPRESS)
    return parser


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what cannot be measured.

    Args:
        options: the parsed command line.
        parser: what reports the mistake, and ends the program with status 2.
    """
    for name in ("batch_size", "steps", "runs", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is not allowed; give at least 1")
    if options.size < 8 or options.size % 8:
        parser.error(f"--size {options.size} is not allowed; give a multiple of 8")
    if not options.config.is_file():
        parser.error(f"--config {options.config}: no such file")


# --- one side, in a process of its own ------------------------------------------------------------------------------

Stages = tuple[Callable[[], Any], Callable[[Any], Any]]
"""What samples latents, prompts' encoding included, and what turns them into pictures."""


def build_ours(options: argparse.Namespace, section: dict[str, Any], device: Any) -> Stages:
    """Build our side as ``txt2img.py`` uses it.

    Args:
        options: the parsed command line.
        section: the configuration's ``model``.
        device: where to sample.

    Returns:
        The two stages.
    """
    import torch
    from sampling_common import DDIM, SAMPLERS, SeededNoise, decode_pictures, downsampling_factor

    from ldm.util import get_obj_from_str, instantiate_from_config

    with torch.device(device):
        model = instantiate_from_config(section, torch.nn.Module).eval()
    # The schedule's tables stay as they are: rounded ones would be another schedule.
    for part in (model.model, model.first_stage_model, model.cond_stage_model):
        prepare(part, options)
    if options.compile:
        model.model.diffusion_model.compile()
        model.first_stage_model.decoder.compile()
    sampler = get_obj_from_str(SAMPLERS[DDIM])(model)
    side = options.size // downsampling_factor(model)
    like = torch.empty(options.batch_size, model.channels, side, side, device=device, dtype=weight_type(options))
    seeds = range(options.batch_size)

    def sample() -> Any:
        latents, _ = sampler.sample(
            options.steps,
            options.batch_size,
            tuple(like.shape[1:]),
            model.get_learned_conditioning([PROMPT] * options.batch_size),
            x_T=SeededNoise(seeds)(like),
            unconditional_guidance_scale=options.scale,
            unconditional_conditioning=model.get_learned_conditioning([NEGATIVE_PROMPT] * options.batch_size),
            verbose=False,
        )
        return latents

    return sample, lambda latents: decode_pictures(model, latents)


def build_diffusers(options: argparse.Namespace, section: dict[str, Any], device: Any) -> Stages:
    """Build the same model from diffusers' parts, and its pipeline's loop: arguments as for :func:`build_ours`.

    Raises:
        ValueError: diffusers is not installed.
    """
    import torch
    from benchmark_sides import build_tokenize
    from sampling_common import SeededNoise, to_pixels

    try:
        from benchmark_diffusers import build_parts
        from diffusers import DDIMScheduler
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; install it with: python -m pip install diffusers, or give --no_peer") from error

    with torch.device(device):
        parts = build_parts(section["params"])
    for part in (parts.unet, parts.vae, parts.text_encoder):
        prepare(part.eval(), options)
    if options.compile:
        parts.unet.compile()
        parts.vae.decoder.compile()
    tokenize = build_tokenize(parts.text_encoder.config.max_position_embeddings)
    scheduler = DDIMScheduler.from_config(
        parts.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    side = options.size // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    like = torch.empty(
        options.batch_size, parts.vae.config.latent_channels, side, side, device=device, dtype=weight_type(options)
    )

    def sample() -> Any:
        texts = [text for text in (NEGATIVE_PROMPT, PROMPT) for _ in range(options.batch_size)]
        context = parts.text_encoder(tokenize(texts).to(device)).last_hidden_state
        scheduler.set_timesteps(options.steps, device=device)
        latents = SeededNoise(range(options.batch_size))(like) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = parts.unet(both, t, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
            latents = scheduler.step(uncond + options.scale * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    def decode(latents: Any) -> Any:
        pictures = parts.vae.decode(latents / parts.vae.config.scaling_factor, return_dict=False)[0]
        return [to_pixels(picture) for picture in pictures]

    return sample, decode


def weight_type(options: argparse.Namespace) -> Any:
    """Give the weights' and latents' dtype."""
    import torch

    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def prepare(part: Any, options: argparse.Namespace) -> None:
    """Bring a module to the precision and layout that the flags ask for."""
    import torch

    layout = torch.channels_last if options.channels_last else torch.preserve_format
    part.to(dtype=weight_type(options), memory_format=layout)


def measure_here(options: argparse.Namespace) -> dict[str, Any]:
    """Make the one measurement that this process was started for.

    Args:
        options: the parsed command line.

    Returns:
        Its figures; ``{"failed": reason}`` for what the user can put right.
    """
    sys.path.insert(0, str(ROOT))  # for a checkout that is not installed
    import torch
    from benchmark_sides import choose_device, synchronize
    from sampling_common import read_model_config

    try:
        device = choose_device(options)
        section = read_model_config(options.config)
        torch.manual_seed(0)
        build = build_ours if options.measure == OURS else build_diffusers
        sample, decode = build(options, section, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # building in float32 is not sampling
    except (ValueError, OSError) as problem:
        return {"failed": str(problem)}

    seconds: dict[str, list[float]] = {"sampling": [], "decoding": []}
    autocast: AbstractContextManager[Any] = nullcontext()
    if options.precision == "autocast":
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(options.runs + 1):  # the first one warms up
            with autocast:
                synchronize(device)
                start = time.perf_counter()
                latents = sample()
                synchronize(device)
                sampled = time.perf_counter()
                decode(latents)
                synchronize(device)
                seconds["sampling"].append(sampled - start)
                seconds["decoding"].append(time.perf_counter() - sampled)
    on_gpu = device.type == "cuda"
    return {
        "seconds": {stage: times[1:] for stage, times in seconds.items()},
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
    }


# --- all sides ------------------------------------------------------------------------------------------------------


def measure_apart(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure a side in a process of its own.

    Args:
        side: its name.
        arguments: the command line of this program.

    Returns:
        Its figures; ``{"failed": reason}`` where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--measure", side, "--out", str(out)]
        ended = subprocess.run(command, check=False)
        if out.is_file():
            figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return figures
        return {"failed": f"exit status {ended.returncode}, see above"}


def summarise(side: str, rounds: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Condense a side's rounds: median times, the largest memory.

    Args:
        side: its name.
        rounds: the figures of each round.
        options: the parsed command line.

    Returns:
        The figures of a row; ``failed`` where a round failed.
    """
    row: dict[str, Any] = {"side": side, "rounds": list(rounds)}
    failures = [figures["failed"] for figures in rounds if "failed" in figures]
    if failures:
        return {**row, "failed": failures[0]}
    for stage in ("sampling", "decoding"):
        row[stage] = statistics.median(time for figures in rounds for time in figures["seconds"][stage])
    whole = row["sampling"] + row["decoding"]
    peaks = [figures["peak_bytes"] for figures in rounds if figures["peak_bytes"] is not None]
    return {
        **row,
        "seconds_per_batch": whole,
        "images_per_second": options.batch_size / whole,
        "steps_per_second": options.steps / row["sampling"],
        "peak_gib": max(peaks) / GIB if peaks else None,
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the rows out as a table.

    Args:
        rows: what :func:`summarise` gives.

    Returns:
        Lines of text, columns aligned; failures below.
    """
    names = ("images_per_second", "seconds_per_batch", "steps_per_second", "sampling", "decoding", "peak_gib")
    lines = [list(COLUMNS)]
    for row in rows:
        if "failed" not in row:
            lines.append([row["side"], *("-" if row[name] is None else f"{row[name]:.3f}" for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([*aligned, *(f"{row['side']} failed: {row['failed']}" for row in rows if "failed" in row)])


def compare(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say how our side stands to the peer's, where both were measured."""
    measured = {row["side"]: row for row in rows if "failed" not in row}
    if len(measured) < 2:
        return []
    ours, theirs = measured[OURS], measured[DIFFUSERS]
    line = f"ours to {DIFFUSERS}: {ours['images_per_second'] / theirs['images_per_second']:.2f} x the speed"
    if ours["peak_gib"] and theirs["peak_gib"]:
        line += f", {ours['peak_gib'] / theirs['peak_gib']:.2f} x the memory"
    return [line]


def describe(options: argparse.Namespace, worked: dict[str, Any] | None) -> list[str]:
    """Say what was measured on what.

    Args:
        options: the parsed command line.
        worked: the figures of some round, or None where all failed.

    Returns:
        Lines of text.
    """
    how = f"{'compiled' if options.compile else 'eager'}{', channels last' if options.channels_last else ''}"
    lines = [
        f"{options.config.name}, {options.steps} DDIM steps, batch {options.batch_size}, "
        f"{options.size}x{options.size}, {options.precision}, guidance {options.scale:g}, {how}, "
        f"median of {options.rounds} x {options.runs} runs"
    ]
    return lines + ([f"{worked['device']}, torch {worked['torch']}"] if worked else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both sides in turn and show the table.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        0, or 1 where a measurement failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_options(options, parser)
    if options.measure:
        options.out.write_text(json.dumps(measure_here(options)), encoding="utf-8")
        return 0

    sides = [OURS] if options.no_peer else [OURS, DIFFUSERS]
    figures: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            print(f"measuring {side} ...", flush=True)
            figures[side].append(measure_apart(side, arguments))
    rows = [summarise(side, rounds, options) for side, rounds in figures.items()]
    if options.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    worked = next((one for rounds in figures.values() for one in rounds if "failed" not in one), None)
    print()
    print("\n".join(describe(options, worked)))
    print(format_table(rows))
    print("\n".join(compare(rows)))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
