r"""Make pictures from text.

    python scripts/txt2img.py --ckpt sd_v1-5_vae.ckpt --prompt "a photo of a red panda in the snow"
    python scripts/txt2img.py --ckpt logs/MyProject2026-10-25T20-37-40_MyProject --from-file prompts.txt \
        --dpm_solver --ddim_steps 20

Each picture has its own seed, --seed plus its number from 0, and depends on that alone: not on how many are made
together, nor on the device. The PNGs hold prompt, seed and settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sampling_common as common
import sampling_pictures as pictures
import torch


def text_to_image(options: argparse.Namespace) -> None:
    """Make the pictures that the flags ask for.

    Raises:
        OSError, ValueError: what the user can put right, in one line.
    """
    common.check_options(options)
    jobs = common.plan_jobs(options, common.read_prompts(options))
    model = common.load_model(options)
    common.check_text_model(model, options)
    width, height = common.picture_size(model, options.W, options.H)
    factor = common.downsampling_factor(model)
    sampler = common.build_sampler(model, options)
    folder = pictures.PictureFolder(options)
    for batch in common.chunks(jobs, options.n_samples):
        noise = common.SeededNoise([job.seed for job in batch])
        shape = (len(batch), model.channels, height // factor, width // factor)
        x = noise(torch.empty(shape, device=model.betas.device))
        made = common.sample_text(model, sampler, options, batch, noise, x, options.ddim_steps)
        for job, pixels in zip(batch, made, strict=True):
            folder.add(pixels, common.describe(options, job, (width, height)))
    folder.write_grid()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None reads the command line.

    Returns:
        The exit status; see :func:`sampling_common.run`.
    """
    parser = common.build_parser(__doc__, "outputs/txt2img-samples")
    common.add_text_flags(parser)
    return common.run(text_to_image, parser.parse_args(argv), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
