"""Make pictures with unconditional and class-conditional models.

    python scripts/sample_diffusion.py --ckpt logs/faces2026-10-25T20-37-40_faces --n_samples 16
    python scripts/sample_diffusion.py --ckpt cin.ckpt --config cin.yaml --classes 25 187 --scale 3 --uncond_class 1000

A run folder brings its own configuration. --n_samples is the number of pictures, for each class where there are
classes; --batch_size says how many are made together, and changes nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import sampling_common as common
import sampling_pictures as pictures
import torch
from torch import Tensor


def sample_diffusion(options: argparse.Namespace) -> None:
    """Make the pictures that the flags ask for.

    Raises:
        OSError, ValueError: what the user can put right, in one line.
    """
    common.check_options(options)
    model = common.load_model(options)
    classes = check_classes(options, class_count(model, options))
    sampler = common.build_sampler(model, options)
    width, height = common.picture_size(model, None, None)
    factor = common.downsampling_factor(model)
    folder = pictures.PictureFolder(options)
    labels = [label for label in classes for _ in range(options.n_samples)]
    for batch in common.chunks(list(enumerate(labels, options.seed)), options.batch_size):
        noise = common.SeededNoise([seed for seed, _ in batch])
        shape = (len(batch), model.channels, height // factor, width // factor)
        x = noise(torch.empty(shape, device=model.betas.device))
        made = sample_classes(model, sampler, options, [label for _, label in batch], noise, x)
        for (seed, label), pixels in zip(batch, made, strict=True):
            folder.add(pixels, describe(options, seed, label, (width, height)))
    folder.write_grid()


@torch.no_grad()
def sample_classes(
    model: Any,
    sampler: Any,
    options: argparse.Namespace,
    labels: Sequence[int | None],
    noise: common.SeededNoise,
    x: Tensor,
) -> list[pictures.Pixels]:
    """Make a batch of pictures.

    Args:
        model: an unconditional or class-conditional model.
        sampler: with its schedule made.
        options: the flags.
        labels: the class of each of the B pictures; None for unconditional models.
        noise: their noise.
        x: (B, C, h, w), their pure noise to begin from.

    Returns:
        B pictures.
    """
    with common.half_precision(x.device, options.precision):
        uncond = None
        if options.uncond_class is not None and options.scale != 1.0:
            uncond = encode_classes(model, [options.uncond_class] * len(labels))
        latents = sampler.decode(
            x,
            encode_classes(model, labels),
            options.ddim_steps,
            unconditional_guidance_scale=options.scale,
            unconditional_conditioning=uncond,
            noise_source=noise,
            verbose=True,
        )
        return common.decode_pictures(model, latents)


def class_count(model: Any, options: argparse.Namespace) -> int:
    """Count a model's classes; 0 for an unconditional one.

    Raises:
        ValueError: the model is conditioned on something else.
    """
    if model.model.conditioning_key is None:
        return 0
    embedding = getattr(model.cond_stage_model, "embedding", None)
    if embedding is not None:
        return int(embedding.num_embeddings)
    if model.model.conditioning_key == "adm":
        return int(model.model.diffusion_model.num_classes)
    if model.cond_stage_key in ("txt", "caption"):
        raise ValueError(f"--ckpt {options.ckpt} is a text-to-image model; use scripts/txt2img.py")
    raise ValueError(f"--ckpt {options.ckpt} is conditioned on {model.cond_stage_key}, which this script cannot give")


def check_classes(options: argparse.Namespace, count: int) -> list[int | None]:
    """Hold the classes that the flags ask for against the model's.

    Returns:
        The classes; one None for an unconditional model.

    Raises:
        ValueError: they do not fit.
    """
    asked = [*(options.classes or []), *([] if options.uncond_class is None else [options.uncond_class])]
    if count == 0 and asked:
        raise ValueError(f"--ckpt {options.ckpt} is unconditional: leave out --classes and --uncond_class")
    if count == 0 and options.scale != 1.0:
        raise ValueError(f"--ckpt {options.ckpt} is unconditional: leave out --scale, there is nothing to guide by")
    if count == 0:
        return [None]
    if not options.classes:
        raise ValueError(f"--ckpt {options.ckpt} has {count} classes: give --classes, numbers within 0 and {count - 1}")
    wrong = [label for label in asked if not 0 <= label < count]
    if wrong:
        raise ValueError(f"class {wrong[0]} is not one of the model's; give numbers within 0 and {count - 1}")
    if options.scale != 1.0 and options.uncond_class is None:
        raise ValueError("--scale needs --uncond_class, the class to move away from")
    return list(options.classes)


def encode_classes(model: Any, labels: Sequence[int | None]) -> Any:
    """Encode class labels as the model takes them; None for an unconditional model."""
    if labels[0] is None:
        return None
    numbers = torch.tensor(labels, device=model.betas.device)
    if hasattr(model.cond_stage_model, "embedding"):
        return model.get_learned_conditioning({model.cond_stage_model.key: numbers})
    return numbers


def describe(options: argparse.Namespace, seed: int, label: int | None, size: tuple[int, int]) -> pictures.Description:
    """Describe a picture, for its metadata."""
    settings: dict[str, Any] = {"Steps": options.ddim_steps, "Sampler": common.sampler_name(options)}
    if label is not None:
        settings |= {"Class": label, "CFG scale": f"{options.scale:g}"}
    if options.ddim_eta > 0:
        settings["Eta"] = f"{options.ddim_eta:g}"
    settings |= {"Size": f"{size[0]}x{size[1]}", "Model": common.model_name(options.ckpt)}
    return pictures.Description(None, "", seed, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status; see :func:`sampling_common.run`.
    """
    parser = common.build_parser(__doc__, "outputs/diffusion-samples")
    parser.add_argument("--n_samples", type=int, default=8, help="pictures, of each class (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures made together (default: %(default)s)")
    parser.add_argument("--classes", type=int, nargs="+", metavar="N", help="classes to show, by number")
    parser.add_argument("--uncond_class", type=int, metavar="N", help="the class that guidance moves away from")
    parser.add_argument("--scale", type=float, default=1.0, help="guidance scale, 1 for none (default: %(default)s)")
    return common.run(sample_diffusion, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
