"""What ``benchmark.py`` measures, each in a process of its own: the card, our training steps, a peer's."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from ldm.exposure import exposure_row
from ldm.training.cli import parse_options
from ldm.training.config import load_run_config
from ldm.training.run_directory import RunDirectory
from ldm.training.stop_signals import StopSignals
from ldm.training.trainer import build_trainer
from ldm.util import get_obj_from_str, instantiate_from_config

SEED: Final = 23
DISTINCT_BATCHES: Final = 4
MATMUL_SIZE: Final = {"cuda": 8192, "cpu": 1024}
MATMUL_SECONDS: Final = 1.0
TFLOP: Final = 1e12


def choose_device(options: argparse.Namespace) -> torch.device:
    """Find the device to measure on.

    Args:
        options: the command line; ``auto`` is the GPU where there is one.

    Returns:
        The device.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    use_gpu = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if use_gpu else torch.device("cpu")


def load_config(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Merge and check the configuration as a training run does.

    Args:
        options: the command line.
        device: where to train.
        folder: an empty folder that stands for the data where no ``--data_root`` is given.

    Returns:
        The merged configuration, as plain containers.

    Raises:
        ValueError: the configuration is wrong; one line a problem.
    """
    words = ["--base", str(options.config), "-t", "--data_root", str(options.data_root or folder)]
    words += ["--precision", options.precision, "--max_epochs", "-1"]
    words += ["--max_steps", str(options.warmup + options.steps), "--limit_val_batches", "0"]
    words += ["--enable_checkpointing", "false"]
    if device.type == "cuda":
        words += ["--gpus", "0,"]
    if options.cudnn_benchmark != "yaml":
        words += ["--benchmark", "true" if options.cudnn_benchmark == "on" else "false"]
    words += [
        f"data.params.batch_size={options.batch_size}",
        f"data.params.train.params.size={options.size}",
        "lightning.callbacks.image_logger.params.disabled=true",
    ]
    if options.gradient_checkpointing != "yaml":
        words.append(f"model.params.unet_config.params.use_checkpoint={options.gradient_checkpointing == 'on'}")
    run_config = load_run_config(parse_options([*words, *options.override]))
    config: dict[str, Any] = OmegaConf.to_container(run_config.config, resolve=True)  # type: ignore[assignment]
    return config


# --- the card --------------------------------------------------------------------------------------------------------


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how fast the device multiplies large square matrices.

    Args:
        device: the device.
        dtype: the factors' type.

    Returns:
        TFLOP/s; a multiply-add counts as 2.
    """
    size = MATMUL_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(SEED)
    # Random numbers, since cards run faster on zeros.
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    for _ in range(3):
        torch.mm(left, right, out=product)
    synchronize(device)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < MATMUL_SECONDS:
        for _ in range(10):
            torch.mm(left, right, out=product)
        synchronize(device)
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - start) / TFLOP


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_work(model_params: Mapping[str, Any], size: int) -> dict[str, float]:
    """Count the floating-point operations that one picture's training step needs.

    The parts are built and run on torch's ``meta`` device, which computes shapes alone. Activations that
    gradient checkpointing computes twice count once: they are a way to do the work, not the work.

    Args:
        model_params: ``model.params`` of a latent diffusion model with a text encoder.
        size: width and height of the picture, in pixels.

    Returns:
        TFLOP of ``vae`` (encoding), ``text_encoder``, ``unet`` and their ``sum``; forward, and backward
        where the part is trained. A multiply-add counts as 2.
    """
    unet_config = dict(model_params["unet_config"])
    unet_config["params"] = {**unet_config["params"], "use_checkpoint": False}
    with torch.device("meta"):
        vae = instantiate_from_config(model_params["first_stage_config"]).requires_grad_(False)
        text_encoder = instantiate_from_config(model_params["cond_stage_config"])
        unet = instantiate_from_config(unet_config)
        text_encoder.requires_grad_(bool(model_params.get("cond_stage_trainable", False)))
        unet.requires_grad_(bool(model_params.get("unfreeze_model", True)))
        picture = torch.empty(1, 3, size, size)
        tokens = torch.zeros(1, text_encoder.max_length, dtype=torch.int64)
        t = torch.zeros(1, dtype=torch.int64)

        work = {}
        with FlopCounterMode(display=False) as vae_count, torch.no_grad():
            latent = vae.encode(picture).mode()
        work["vae"] = vae_count.get_total_flops()
        with FlopCounterMode(display=False) as text_count:
            context = text_encoder(tokens)
            if context.requires_grad:
                context.sum().backward()
        work["text_encoder"] = text_count.get_total_flops()
        with FlopCounterMode(display=False) as unet_count:
            # The text encoder's gradient flows back through the UNet.
            given = context.detach().requires_grad_(context.requires_grad)
            unet(latent, t, context=given).sum().backward()
        work["unet"] = unet_count.get_total_flops()
    work = {part: flops / TFLOP for part, flops in work.items()}
    return {**work, "sum": sum(work.values())}


def measure_card(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the device can do, and count what a picture needs.

    Args:
        options: the command line.

    Returns:
        ``device``, ``torch``, ``matmul_tflops``, ``matmul_type`` and ``tflop_per_image``.
    """
    device = choose_device(options)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options, device, Path(folder))
    dtype = autocast_type(options.precision) or torch.float32
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "matmul_tflops": matmul_rate(device, dtype),
        "matmul_type": f"{dtype}".removeprefix("torch."),
        "tflop_per_image": count_work(config["model"]["params"], options.size),
    }


def autocast_type(precision: str) -> torch.dtype | None:
    """Give the type that Lightning's mixed precisions compute in; None for 32-true."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


# --- training steps --------------------------------------------------------------------------------------------------


class SyntheticBatches(Dataset[dict[str, Any]]):
    """Batches of random pictures with captions, ready made, so that loading costs next to nothing.

    Args:
        batch_size: pictures in a batch.
        size: width and height in pixels.
        count: how many batches to offer; a few distinct ones, over and over, each with exposures of its own.
    """

    def __init__(self, batch_size: int, size: int, count: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.images = [
            torch.rand(batch_size, size, size, 3, generator=generator) * 2 - 1 for _ in range(DISTINCT_BATCHES)
        ]
        self.captions = [
            f"a synthetic picture number {number} of coloured noise, as the benchmark uses it"
            for number in range(batch_size)
        ]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        images = self.images[index % DISTINCT_BATCHES]
        exposures = torch.stack([exposure_row(SEED, 0, index, place) for place in range(len(images))])
        return {"image": images, "caption": self.captions, "exposure": exposures}


class StepClock(pl.Callback):
    """Takes the time from the end of the warm-up to the end of training, and the memory's peak over all.

    Args:
        device: where training runs.
        warmup: steps before the clock starts.
        steps: steps to time.
    """

    def __init__(self, device: torch.device, warmup: int, steps: int) -> None:
        self.device = device
        self.warmup = warmup
        self.steps = steps
        self.done = 0
        self.seconds = 0.0
        self.loss: Tensor | None = None
        self._started = 0.0

    def begin(self) -> None:
        """Forget the memory's peak so far: building a model is not training it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step(self, loss: Tensor) -> None:
        """Count an optimiser step.

        Args:
            loss: its loss.
        """
        self.done += 1
        self.loss = loss
        if self.done in (self.warmup, self.warmup + self.steps):
            synchronize(self.device)
            now = time.perf_counter()
            self.seconds = now - self._started
            self._started = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step of Lightning's."""
        self.step(outputs["loss"])

    def figures(self, batch_size: int) -> dict[str, Any]:
        """Give the result.

        Args:
            batch_size: pictures in a step.

        Returns:
            Seconds a step, and peak memory in bytes: the card's, or on a CPU the whole process's.

        Raises:
            ValueError: training ended early, or its loss is not a number.
        """
        if self.done < self.warmup + self.steps or self.loss is None:
            raise ValueError(f"training ended after {self.done} of {self.warmup + self.steps} steps")
        if not bool(torch.isfinite(self.loss)):
            raise ValueError(f"the loss became {float(self.loss)}: what was timed was not training")
        on_gpu = self.device.type == "cuda"
        return {
            "batch_size": batch_size,
            "seconds_per_step": self.seconds / self.steps,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_process_bytes(),
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device) if on_gpu else None,
            "loss": float(self.loss),
        }


def peak_process_bytes() -> int:
    """Read the largest resident memory this process has had, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_steps(options: argparse.Namespace, side: str, from_folder: bool) -> dict[str, Any]:
    """Time training steps of one side.

    Args:
        options: the command line.
        side: ``ours``, or the peer's name.
        from_folder: train on ``--data_root`` through the loaders of a run, else on synthetic pictures.

    Returns:
        What :meth:`StepClock.figures` gives, and ``parameters``: how many each part has.

    Raises:
        ValueError: something in configuration, data or peer is wrong.
        MemoryError: the device's memory does not suffice.
    """
    device = choose_device(options)
    torch.manual_seed(SEED)
    train = train_ours if side == "ours" else train_peer
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options, device, Path(folder))
        if from_folder:
            data = instantiate_from_config(config["data"])
        else:
            count = options.warmup + options.steps
            data = DataLoader(
                SyntheticBatches(options.batch_size, options.size, count),
                batch_size=None,
                pin_memory=device.type == "cuda",
            )
        clock = StepClock(device, options.warmup, options.steps)
        try:
            parameters = train(options, config, device, data, clock, Path(folder))
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"out of memory: lower --batch_size ({str(error).splitlines()[0]})") from error
    return {**clock.figures(options.batch_size), "parameters": parameters}


def count_parameters(**parts: nn.Module) -> dict[str, int]:
    """Count the parameters of each part."""
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def train_ours(
    options: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    data: Any,
    clock: StepClock,
    folder: Path,
) -> dict[str, int]:
    """Train as ``main.py`` does: the run's own Trainer, callbacks and logger, without pictures and checkpoints.

    Args:
        options: the command line.
        config: the merged configuration.
        device: where to train.
        data: a loader of batches, or a data module.
        clock: what counts the steps.
        folder: where the run writes its curves.

    Returns:
        The number of parameters of each part.
    """
    with torch.device(device):  # initialising a billion weights takes a GPU a moment, and a CPU half a minute
        model = instantiate_from_config(config["model"])
    model.learning_rate = float(config["model"]["base_learning_rate"])
    if options.compile:
        model.model.diffusion_model.compile()
        model.first_stage_model.encoder.compile()
    with StopSignals() as signals:
        trainer = build_trainer(
            config.get("lightning") or {},
            RunDirectory(folder / "run", datetime.now().strftime("%H-%M-%S")),
            signals,
            batch_size=options.batch_size,
            monitor=None,
            validates=False,
        )
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        if isinstance(data, pl.LightningDataModule):
            trainer.fit(model, datamodule=data)
        else:
            trainer.fit(model, train_dataloaders=data)
    return count_parameters(
        unet=model.model.diffusion_model, vae=model.first_stage_model, text_encoder=model.cond_stage_model
    )


def endless_batches(data: Any) -> Iterator[dict[str, Any]]:
    """Yield batches of a loader or a data module's training set, over and over."""
    loader = data
    if isinstance(data, pl.LightningDataModule):
        data.setup("fit")
        loader = data.train_dataloader()
    while True:
        yield from loader


def build_tokenize(length: int) -> Callable[[list[str]], Tensor]:
    """Build the function from captions to token ids that any CLIP text encoder takes.

    Args:
        length: tokens of each caption.

    Returns:
        A function from B texts to int64 (B, length).
    """
    tokenizer = get_obj_from_str("ldm.modules.encoders.tokenizer.build_tokenizer")()

    def tokenize(captions: list[str]) -> Tensor:
        encoded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = encoded.input_ids
        return ids

    return tokenize


def train_peer(
    options: argparse.Namespace,
    config: dict[str, Any],
    device: torch.device,
    data: Any,
    clock: StepClock,
    folder: Path,
) -> dict[str, int]:
    """Train the same model built from diffusers' parts, in a plain loop: arguments as for :func:`train_ours`.

    float32 weights under autocast, ``torch.optim.AdamW`` over UNet and text encoder, the VAE's encoder in every
    step, no logging.

    Raises:
        ValueError: diffusers is not installed.
    """
    try:
        from benchmark_diffusers import build_parts
    except ModuleNotFoundError as error:
        raise ValueError(f"--peer diffusers: {error}; install it with: python -m pip install diffusers") from error

    params = config["model"]["params"]
    with torch.device(device):
        parts = build_parts(params)
    if options.gradient_checkpointing == "on":
        parts.unet.enable_gradient_checkpointing()
    if options.compile:
        parts.unet.compile()
        parts.vae.encoder.compile()
    torch.backends.cudnn.benchmark = bool(config["lightning"]["trainer"].get("benchmark"))
    parts.vae.requires_grad_(False).eval()
    parts.text_encoder.requires_grad_(bool(params.get("cond_stage_trainable", False))).train()
    parts.unet.requires_grad_(bool(params.get("unfreeze_model", True))).train()
    trained = [p for part in (parts.unet, parts.text_encoder) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=float(config["model"]["base_learning_rate"]))
    dtype = autocast_type(options.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    tokenize = build_tokenize(parts.text_encoder.config.max_position_embeddings)

    clock.begin()
    for batch, _ in zip(endless_batches(data), range(options.warmup + options.steps), strict=False):
        images = batch["image"].to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        tokens = tokenize(list(batch["caption"])).to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            with torch.no_grad():
                latents = parts.vae.encode(images).latent_dist.sample() * parts.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, parts.scheduler.config.num_train_timesteps, (len(latents),), device=device)
            context = parts.text_encoder(tokens).last_hidden_state
            noisy = parts.scheduler.add_noise(latents, noise, t)
            output = parts.unet(noisy, t, encoder_hidden_states=context).sample
            loss = nn.functional.mse_loss(output.float(), noise.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clock.step(loss.detach())
    return count_parameters(unet=parts.unet, vae=parts.vae, text_encoder=parts.text_encoder)
