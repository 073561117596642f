"""Make pictures from a picture and text.

    python scripts/img2img.py --ckpt sd_v1-5_vae.ckpt --init-img sketch.png --prompt "an oil painting" --strength 0.6

--strength says how much of the picture may change: it is noised by that part of the steps, and denoised again. The
result has the picture's size, cut to multiples of 8, or --W and --H.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import sampling_common as common
import sampling_pictures as pictures
import torch
from PIL import Image


def image_to_image(options: argparse.Namespace) -> None:
    """Make the pictures that the flags ask for.

    Raises:
        OSError, ValueError: what the user can put right, in one line.
    """
    common.check_options(options)
    jobs = common.plan_jobs(options, common.read_prompts(options))
    picture = pictures.read_picture(options.init_img, "--init-img")
    model = common.load_model(options)
    common.check_text_model(model, options)
    picture = fit(picture, options, max(common.SIDE, common.downsampling_factor(model)))
    sampler = common.build_sampler(model, options)
    folder = pictures.PictureFolder(options)
    # Some step is always taken, and the tiny amount keeps 0.29 * 100 from being 28.
    steps = max(1, int(options.strength * options.ddim_steps + 1e-6))
    for batch in common.chunks(jobs, options.n_samples):
        noise = common.SeededNoise([job.seed for job in batch])
        z = common.encode_picture(model, picture, options, noise)
        # Noised to the very timestep that sampling begins at.
        t = torch.full((len(batch),), steps - 1, device=z.device, dtype=torch.int64)
        x = sampler.stochastic_encode(z, t, noise=noise(z))
        made = common.sample_text(model, sampler, options, batch, noise, x, steps)
        for job, pixels in zip(batch, made, strict=True):
            strength = {"Denoising strength": f"{options.strength:g}"}
            folder.add(pixels, common.describe(options, job, picture.size, **strength))
    folder.write_grid()


def fit(picture: Image.Image, options: argparse.Namespace, multiple: int) -> Image.Image:
    """Resize a picture to the size that the flags ask for, else to the next smaller one that the model can make.

    Args:
        picture: RGB.
        options: the flags.
        multiple: of pixels, that width and height must be.

    Raises:
        ValueError: it is smaller than that, or the flags ask for another multiple.
    """
    width, height = (options.W or picture.width, options.H or picture.height)
    if any(given and given % multiple for given in (options.W, options.H)):
        raise ValueError(f"a size of {width}x{height} is not allowed; this model needs multiples of {multiple}")
    size = (width - width % multiple, height - height % multiple)
    if min(size) == 0:
        raise ValueError(f"--init-img {options.init_img} is {picture.width}x{picture.height}: too small")
    if size == picture.size:
        return picture
    print(f"note: the picture is resized from {picture.width}x{picture.height} to {size[0]}x{size[1]}")
    return picture.resize(size, Image.Resampling.LANCZOS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status; see :func:`sampling_common.run`.
    """
    parser = common.build_parser(__doc__, "outputs/img2img-samples")
    common.add_text_flags(parser)
    parser.add_argument("--init-img", type=Path, required=True, metavar="FILE", help="the picture to begin from")
    parser.add_argument(
        "--strength", type=float, default=0.75, help="more than 0, up to 1: all may change (default: %(default)s)"
    )
    return common.run(image_to_image, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
