"""The validation set: each picture once, as it is, so that two epochs can be compared."""

from __future__ import annotations

from ldm.data.every_dream import EveryDreamBatch


class EDValidateBatch(EveryDreamBatch):
    """The pictures of :class:`EveryDreamBatch`, each once and without augmentation or caption dropout.

    Its exposures are keyed by the picture alone, so noise and timesteps are the same in every epoch and run.

    Args:
        data_root: folder that holds subfolders of pictures.
        size: pixels, a multiple of 8, as in training; None keeps each picture's own size.
        set: ``"val"``, ``"validation"``, ``"test"`` or ``"train"``; all mean the same here.
        repeats: accepted for the YAML files that give it, without effect: each picture counts once.
        interpolation: resampling filter: ``linear``, ``bilinear``, ``bicubic`` or ``lanczos``.
        center_crop: True is the older way to say ``resize_mode: center_crop``.
        resize_mode: ``bucket`` (the default), ``center_crop`` or ``squash``, as in training.
        on_bad_image: ``error`` or ``skip``, as in training.
        seed: accepted like the training set's, without effect: nothing here depends on the run.
        recursive: also take pictures in folders below the subfolders.
        cache_latents: ``disk``, ``memory`` or ``off``, as in training; a test set reads its pictures in any case.
        cache_dir: as in training.

    Raises:
        ValueError: an argument out of range, or a folder that cannot be used; a line for each problem.
        OSError: ``data_root`` does not exist or is a file.
    """

    def __init__(
        self,
        data_root: str,
        size: int | None = 512,
        set: str = "val",
        repeats: float = 1,
        interpolation: str = "bicubic",
        center_crop: bool = False,
        resize_mode: str | None = None,
        on_bad_image: str = "error",
        seed: int = 23,
        recursive: bool = False,
        cache_latents: str | bool = "off",
        cache_dir: str = "latent_cache",
    ) -> None:
        super().__init__(
            data_root=data_root,
            size=size,
            set="val" if set == "train" else set,
            interpolation=interpolation,
            center_crop=center_crop,
            resize_mode=resize_mode,
            on_bad_image=on_bad_image,
            seed=seed,
            recursive=recursive,
            cache_latents=cache_latents,
            cache_dir=cache_dir,
        )
