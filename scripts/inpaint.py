"""Repaint a part of a picture from text, with any Stable Diffusion v1 model.

    python scripts/inpaint.py --ckpt sd_v1-5_vae.ckpt --init-img room.png --mask mask.png --prompt "a green sofa"

The mask is a picture of the same size: white is repainted, black is kept, pixel for pixel. Width and height of both
must divide by 8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sampling_common as common
import sampling_pictures as pictures
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def inpaint(options: argparse.Namespace) -> None:
    """Make the pictures that the flags ask for.

    Raises:
        OSError, ValueError: what the user can put right, in one line.
    """
    common.check_options(options)
    jobs = common.plan_jobs(options, common.read_prompts(options))
    picture, repainted = read_pair(options)
    model = common.load_model(options)
    common.check_text_model(model, options)
    common.picture_size(model, *picture.size)
    sampler = common.build_sampler(model, options)
    folder = pictures.PictureFolder(options)
    kept_latents = latent_mask(repainted, common.downsampling_factor(model)).to(model.betas.device)
    original = np.asarray(picture)
    steps = max(1, int(options.strength * options.ddim_steps + 1e-6))
    for batch in common.chunks(jobs, options.n_samples):
        noise = common.SeededNoise([job.seed for job in batch])
        z = common.encode_picture(model, picture, options, noise)
        x = noise(z)
        if steps < options.ddim_steps:
            t = torch.full((len(batch),), steps - 1, device=z.device, dtype=torch.int64)
            x = sampler.stochastic_encode(z, t, noise=x)
        made = common.sample_text(model, sampler, options, batch, noise, x, steps, mask=kept_latents, x0=z)
        for job, pixels in zip(batch, made, strict=True):
            pasted = np.where(repainted[:, :, None], pixels, original)
            strength = {"Denoising strength": f"{options.strength:g}"}
            folder.add(pasted, common.describe(options, job, picture.size, **strength))
    folder.write_grid()


def read_pair(options: argparse.Namespace) -> tuple[Image.Image, NDArray[np.bool_]]:
    """Read the picture and its mask.

    Returns:
        The picture, and bool (H, W): what is repainted.

    Raises:
        OSError: a file cannot be read.
        ValueError: their sizes differ or do not divide by 8, or nothing is to be repainted.
    """
    picture = pictures.read_picture(options.init_img, "--init-img")
    mask = pictures.read_picture(options.mask, "--mask", "L")
    if mask.size != picture.size:
        raise ValueError(
            f"--mask {options.mask} is {mask.width}x{mask.height}, the picture is {picture.width}x{picture.height};"
            " give a mask of the picture's size"
        )
    wanted = (options.W or picture.width, options.H or picture.height)
    if wanted != picture.size:
        print(f"note: picture and mask are resized from {picture.width}x{picture.height} to {wanted[0]}x{wanted[1]}")
        picture = picture.resize(wanted, Image.Resampling.LANCZOS)
        mask = mask.resize(wanted, Image.Resampling.NEAREST)
    if any(side % common.SIDE for side in picture.size):
        raise ValueError(
            f"--init-img {options.init_img} is {picture.width}x{picture.height}: width and height must divide by"
            f" {common.SIDE}; crop picture and mask, or give --W and --H to resize both"
        )
    repainted = np.asarray(mask) >= 128
    if not repainted.any():
        raise ValueError(f"--mask {options.mask} is black: nothing is to be repainted; make that part white")
    return picture, repainted


def latent_mask(repainted: NDArray[np.bool_], factor: int) -> Tensor:
    """Find the latent cells to keep: those with no repainted pixel.

    Args:
        repainted: (H, W).
        factor: pixels that a cell is wide.

    Returns:
        float32 (1, 1, H / factor, W / factor): 1 to keep.
    """
    pixels = torch.from_numpy(repainted.astype(np.float32))[None, None]
    return 1.0 - F.max_pool2d(pixels, factor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status; see :func:`sampling_common.run`.
    """
    parser = common.build_parser(__doc__, "outputs/inpaint-samples")
    common.add_text_flags(parser)
    parser.add_argument("--init-img", type=Path, required=True, metavar="FILE", help="the picture")
    parser.add_argument("--mask", type=Path, required=True, metavar="FILE", help="white is repainted, black is kept")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="below 1 the repainted part keeps some of what was there"
    )
    return common.run(inpaint, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
