"""Stable Diffusion v1 in the folders of diffusers: the same weights under other names.

A folder holds ``model_index.json`` and a sub-folder for each part. The names in it follow from the model's
config, so that any UNet and first stage of v1's kind is read and written, whatever its size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import read_weights
from ldm.util import get_obj_from_str

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
"""Prefixes of the three parts in a checkpoint."""

PARTS: Final[Mapping[str, str]] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
"""Sub-folder -> prefix in a checkpoint."""

WEIGHT_FILES: Final[Mapping[str, str]] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Sub-folder -> name of its weight file, without the ending."""

_MOST_STEPS: Final = 100_000
"""Timesteps of a noise schedule."""

_LONGEST_WORD: Final = 100
"""Characters of what a folder's JSON files say that a message shows."""

_NOT_TRANSLATED: Final = ("first_stage_model.loss.",)
_POSITION_IDS: Final = "embeddings.position_ids"

_PREDICTIONS: Final = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# CompVis calls a schedule linear that is linear in the square root, and sqrt_linear the one that is linear.
_BETA_SCHEDULES: Final = {"linear": "scaled_linear", "sqrt_linear": "linear"}

_RES_BLOCK: Final = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RES_BLOCK: Final = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION: Final = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_ATTENTION_BEFORE_2023: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class FolderFormat:
    """Translates between a model's checkpoint keys and the contents of a diffusers folder.

    Args:
        params: ``model.params`` of the config.

    Raises:
        ValueError: the model has something that diffusers' Stable Diffusion parts have not.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.unet: Mapping[str, Any] = _section(params, "unet_config")
        self.first_stage: Mapping[str, Any] = _section(params, "first_stage_config")
        self.ddconfig: Mapping[str, Any] = self.first_stage.get("ddconfig") or {}
        self.text_config: Mapping[str, Any] = _section(params, "cond_stage_config").get(
            "text_config"
        ) or get_obj_from_str("ldm.modules.encoders.modules.CLIP_VIT_L_14_TEXT")
        refusals = self._refusals()
        if refusals:
            raise ValueError(
                f"this model has no form as a diffusers folder of Stable Diffusion v1: {'; '.join(refusals)}"
            )
        self._names = {
            "unet": unet_names(
                self.unet["channel_mult"], self.unet["num_res_blocks"], self.unet["attention_resolutions"]
            ),
            "vae": vae_names(self.ddconfig["ch_mult"], self.ddconfig["num_res_blocks"]),
        }

    def _refusals(self) -> list[str]:
        unet, dd = self.unet, self.ddconfig
        wanted: list[tuple[str, Any, Any]] = [
            ("conditioning_key", self.params.get("conditioning_key") or "crossattn", "crossattn"),
            ("cond_stage_config.layer", _section(self.params, "cond_stage_config").get("layer") or "last", "last"),
            ("unet_config.use_spatial_transformer", unet.get("use_spatial_transformer", False), True),
            ("unet_config.num_classes", unet.get("num_classes"), None),
            ("unet_config.n_embed", unet.get("n_embed"), None),
            ("unet_config.dims", unet.get("dims", 2), 2),
            ("unet_config.resblock_updown", unet.get("resblock_updown", False), False),
            ("unet_config.use_scale_shift_norm", unet.get("use_scale_shift_norm", False), False),
            ("unet_config.conv_resample", unet.get("conv_resample", True), True),
            ("first_stage_config.ddconfig.attn_resolutions", list(dd.get("attn_resolutions") or []), []),
            ("first_stage_config.ddconfig.attn_type", dd.get("attn_type", "vanilla"), "vanilla"),
            ("first_stage_config.ddconfig.use_linear_attn", dd.get("use_linear_attn", False), False),
            ("first_stage_config.ddconfig.resamp_with_conv", dd.get("resamp_with_conv", True), True),
            ("first_stage_config.ddconfig.double_z", dd.get("double_z", True), True),
            ("first_stage_config.ddconfig.tanh_out", dd.get("tanh_out", False), False),
            ("first_stage_config.embed_dim", self.first_stage.get("embed_dim"), dd.get("z_channels")),
        ]
        refusals = [f"{key} is {value!r}, not {needed!r}" for key, value, needed in wanted if value != needed]
        target = str(self.params["cond_stage_config"].get("target"))
        if not target.endswith(".FrozenCLIPEmbedder"):
            refusals.append(f"cond_stage_config.target is {target}, not FrozenCLIPEmbedder")
        unet_keys = ("channel_mult", "num_res_blocks", "model_channels", "attention_resolutions", "context_dim")
        absent = [f"unet_config.{key}" for key in unet_keys if key not in unet]
        absent += [f"first_stage_config.ddconfig.{key}" for key in ("ch_mult", "num_res_blocks", "ch") if key not in dd]
        return [*refusals, *(f"{key} is missing" for key in absent)]

    def to_folder(self, weights: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
        """Translate a checkpoint's weights.

        Args:
            weights: the weights under checkpoint keys; schedule tables and the like are passed over.
            source: the file's name, for messages.

        Returns:
            For each sub-folder its weights under diffusers' names.

        Raises:
            ValueError: it is another kind of model, a part is missing, or a key is unknown.
        """
        kind = foreign_kind(weights)
        if kind is not None:
            raise ValueError(f"'{source}' is {kind}; this reads Stable Diffusion v1")
        translated: dict[str, dict[str, Tensor]] = {}
        for part, prefix in PARTS.items():
            own = {
                key.removeprefix(prefix): value
                for key, value in weights.items()
                if key.startswith(prefix) and not key.startswith(_NOT_TRANSLATED) and not key.endswith(_POSITION_IDS)
            }
            if not own:
                raise ValueError(f"'{source}' holds no {part} (no key begins with {prefix}); name a whole model's file")
            translated[part] = self._translate(part, own, self._names.get(part), source)
        translated["vae"] = {key: _as_linear(key, value) for key, value in translated["vae"].items()}
        return translated

    def to_checkpoint(self, parts: Mapping[str, Mapping[str, Tensor]], source: str) -> dict[str, Tensor]:
        """Translate a folder's weights.

        Args:
            parts: for each sub-folder its weights under diffusers' names, today's or those before 2023; the text
                encoder's with or without ``text_model.`` before them.
            source: the folder's name, for messages.

        Returns:
            The weights under checkpoint keys.

        Raises:
            ValueError: a key is unknown.
        """
        weights: dict[str, Tensor] = {}
        for part, prefix in PARTS.items():
            own = dict(parts[part])
            if part == "vae":
                own = {_today(key): value for key, value in own.items()}
            if part == "text_encoder":
                own = {"text_model." + key.removeprefix("text_model."): value for key, value in own.items()}
                own = {key: value for key, value in own.items() if not key.endswith(_POSITION_IDS)}
            names = self._names.get(part)
            backwards = None if names is None else {theirs: ours for ours, theirs in names.items()}
            named = self._translate(part, own, backwards, source)
            if part == "vae":
                named = {key: _as_convolution(key, value) for key, value in named.items()}
            weights |= {prefix + key: value for key, value in named.items()}
        return weights

    def _translate(
        self, part: str, weights: Mapping[str, Tensor], names: Mapping[str, str] | None, source: str
    ) -> dict[str, Tensor]:
        if names is None:
            return dict(weights)
        found = {key: renamed(key, names) for key in weights}
        unknown = [key for key, name in found.items() if name is None]
        if unknown:
            raise ValueError(
                f"'{source}' does not fit the config: {len(unknown)} keys of its {part} have no place in it "
                f"({', '.join(unknown[:3])}); name the model's own config with --config"
            )
        return {name: weights[key] for key, name in found.items() if name is not None}

    def configs(self, betas: Sequence[float], scale_factor: float) -> dict[str, dict[str, Any]]:
        """Describe the model in the words of diffusers.

        Args:
            betas: the noise schedule, for those that diffusers has no name for.
            scale_factor: factor from the first stage's latents to the UNet's.

        Returns:
            File of the folder -> its JSON content, without the tokeniser's.
        """
        return {
            "model_index.json": {
                "_class_name": "StableDiffusionPipeline",
                "feature_extractor": [None, None],
                "image_encoder": [None, None],
                "requires_safety_checker": False,
                "safety_checker": [None, None],
                "scheduler": ["diffusers", self._scheduler(betas)["_class_name"]],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
            "unet/config.json": self._unet(),
            "vae/config.json": self._vae(scale_factor),
            "text_encoder/config.json": self._text_encoder(),
            "scheduler/scheduler_config.json": self._scheduler(betas),
        }

    def _unet(self) -> dict[str, Any]:
        unet = self.unet
        attended = [2**level in unet["attention_resolutions"] for level in range(len(unet["channel_mult"]))]
        channels = [unet["model_channels"] * mult for mult in unet["channel_mult"]]
        width = unet.get("num_head_channels", -1)
        return {
            "_class_name": "UNet2DConditionModel",
            "act_fn": "silu",
            # The name is diffusers' misnomer for the number of heads.
            "attention_head_dim": unet["num_heads"] if width == -1 else [count // width for count in channels],
            "block_out_channels": channels,
            "center_input_sample": False,
            "cross_attention_dim": unet["context_dim"],
            "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attended],
            "downsample_padding": 1,
            "dropout": unet.get("dropout", 0.0),
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": unet["in_channels"],
            "layers_per_block": unet["num_res_blocks"],
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": 32,
            "out_channels": unet["out_channels"],
            "sample_size": self.params["image_size"],
            "transformer_layers_per_block": unet.get("transformer_depth", 1),
            "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attended)],
        }

    def _vae(self, scale_factor: float) -> dict[str, Any]:
        dd = self.ddconfig
        levels = len(dd["ch_mult"])
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": [dd["ch"] * mult for mult in dd["ch_mult"]],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "in_channels": dd["in_channels"],
            "latent_channels": dd["z_channels"],
            "layers_per_block": dd["num_res_blocks"],
            "norm_num_groups": 32,
            "out_channels": dd["out_ch"],
            "sample_size": dd["resolution"],
            "scaling_factor": scale_factor,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }

    def _text_encoder(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dropout": 0.0,
            "eos_token_id": 2,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "pad_token_id": 1,
            **self.text_config,
        }

    def _scheduler(self, betas: Sequence[float]) -> dict[str, Any]:
        params = self.params
        prediction = _PREDICTIONS[params.get("parameterization") or "eps"]
        common = {
            "beta_end": params.get("linear_end", 2e-2),
            "beta_start": params.get("linear_start", 1e-4),
            "clip_sample": False,
            "num_train_timesteps": len(betas),
            "prediction_type": prediction,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        name = _BETA_SCHEDULES.get(params.get("beta_schedule") or "linear")
        zero_terminal = bool(params.get("zero_terminal_snr"))
        if name is None or params.get("given_betas") is not None or zero_terminal:
            schedule: dict[str, Any] = {"beta_schedule": "linear", "trained_betas": [float(beta) for beta in betas]}
        else:
            schedule = {"beta_schedule": name, "trained_betas": None}
        # PNDM is what published folders name; it neither knows x0 models nor a schedule that ends without signal.
        if prediction == "sample" or zero_terminal:
            spacing = {"timestep_spacing": "trailing"} if zero_terminal else {}
            return {"_class_name": "DDIMScheduler", **common, **schedule, **spacing}
        return {"_class_name": "PNDMScheduler", **common, **schedule, "skip_prk_steps": True}

    def check_configs(self, folder: Path) -> None:
        """Compare what a folder says of its model with the config.

        Args:
            folder: a diffusers folder.

        Raises:
            ValueError: the two describe different models.
        """
        kind = _foreign_folder(folder)
        if kind is not None:
            raise ValueError(f"'{folder}' is {kind}; this reads Stable Diffusion v1")
        expected = {"unet/config.json": self._unet(), "text_encoder/config.json": self._text_encoder()}
        compared = {
            "unet/config.json": ("attention_head_dim", "cross_attention_dim", "block_out_channels", "in_channels"),
            "text_encoder/config.json": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
        }
        problems = [
            f"{file} says {key} {_word(theirs[key])}, the config {expected[file][key]!r}"
            for file, keys in compared.items()
            for theirs in [_read_json(folder / file)]
            for key in keys
            if key in theirs and key in expected[file] and _as_list(theirs[key]) != _as_list(expected[file][key])
        ]
        scale = _number(_read_json(folder / "vae/config.json"), "scaling_factor", 0.18215)
        own_scale = self.params.get("scale_factor", 1.0)
        if not self.params.get("scale_by_std") and not np.isclose(scale, own_scale, rtol=1e-5):
            problems.append(f"vae/config.json says scaling_factor {scale}, the config scale_factor {own_scale}")
        problems += self._schedule_problems(_read_json(folder / "scheduler/scheduler_config.json"))
        if problems:
            raise ValueError(f"'{folder}' does not fit the config: {'; '.join(problems)}")

    def _schedule_problems(self, theirs: Mapping[str, Any]) -> list[str]:
        if not theirs:
            return []
        problems = []
        prediction = _PREDICTIONS[self.params.get("parameterization") or "eps"]
        if theirs.get("prediction_type", prediction) != prediction:
            problems.append(
                f"scheduler/scheduler_config.json says prediction_type {_word(theirs['prediction_type'])}, the config "
                f"parameterization {self.params.get('parameterization') or 'eps'!r}"
            )
        betas, own = _folder_betas(theirs), schedule_tables(self.params)["betas"].double()
        if betas is not None and (betas.shape != own.shape or not torch.allclose(betas, own, rtol=1e-3, atol=1e-7)):
            told = {key: theirs.get(key) for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}
            problems.append(
                "scheduler/scheduler_config.json has another noise schedule than the config ("
                + ", ".join(key + " " + _word(value).strip("'") for key, value in told.items())
                + ")"
            )
        return problems


def schedule_tables(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute the schedule tables that a checkpoint holds.

    Args:
        params: ``model.params`` of the config.

    Returns:
        Each table by its key, float32 (T,).
    """
    build = get_obj_from_str("ldm.models.diffusion.noise_schedule.build_noise_schedule")
    names = (
        *("given_betas", "beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s", "v_posterior"),
        "zero_terminal_snr",
    )
    tables: dict[str, Tensor] = build(**{name: params[name] for name in names if name in params}).tensors()
    return tables


def _folder_betas(scheduler: Mapping[str, Any]) -> Tensor | None:
    """Compute the betas that a folder's scheduler describes, float64 (T,); None for a kind unknown here."""
    trained = scheduler.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(isinstance(beta, (int, float)) for beta in trained):
            raise ValueError("scheduler/scheduler_config.json is damaged: its trained_betas are no list of numbers")
        return torch.tensor(list(map(_as_float, trained)), dtype=torch.float64)
    if scheduler.get("rescale_betas_zero_snr"):
        return None
    start, end = _number(scheduler, "beta_start", 1e-4), _number(scheduler, "beta_end", 2e-2)
    steps = _number(scheduler, "num_train_timesteps", 1000)
    if not (0 <= start < 1 and 0 <= end < 1 and 1 <= steps <= _MOST_STEPS):
        raise ValueError("scheduler/scheduler_config.json describes no noise schedule (beta_start, beta_end, steps)")
    steps = int(steps)
    kind = scheduler.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.linspace(start, end, steps, dtype=torch.float64) if kind == "linear" else None


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Read a number from a part's JSON file."""
    value = config.get(key, default)
    if not isinstance(value, (int, float)):
        raise ValueError(f"the folder says {key} {_word(value)}, which is no number; copy it again")
    return _as_float(value)


def _as_float(value: float) -> float:
    """Convert a number; one beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _word(value: Any) -> str:
    """Write what a file says so that it stays on its line and does nothing to a terminal."""
    text = repr(value)
    return text if len(text) <= _LONGEST_WORD else f"{text[:_LONGEST_WORD]}…"


def unet_names(
    channel_mult: Sequence[int], num_res_blocks: int, attention_resolutions: Sequence[int]
) -> dict[str, str]:
    """Pair the names of the UNet's layers.

    Args:
        channel_mult: the UNet's, one entry a level.
        num_res_blocks: residual blocks a level.
        attention_resolutions: down-sampling factors of the levels that have attention.

    Returns:
        Beginning of a checkpoint key -> of a diffusers key, without the prefix of the part.
    """
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def add_res_block(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{old}": f"{theirs}.{new}" for old, new in _RES_BLOCK.items()})

    add_res_block("middle_block.0", "mid_block.resnets.0")
    add_res_block("middle_block.2", "mid_block.resnets.1")
    levels, block = len(channel_mult), 1
    for level in range(levels):
        for index in range(num_res_blocks):
            add_res_block(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{index}")
            if 2**level in attention_resolutions:
                names[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{index}"
            block += 1
        if level < levels - 1:
            names[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level in range(levels):  # from the coarsest
        has_attention = 2 ** (levels - 1 - level) in attention_resolutions
        for index in range(num_res_blocks + 1):
            add_res_block(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{index}")
            if has_attention:
                names[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{index}"
            block += 1
        if level < levels - 1:
            names[f"output_blocks.{block - 1}.{1 + has_attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def vae_names(ch_mult: Sequence[int], num_res_blocks: int) -> dict[str, str]:
    """Pair the names of the first stage's layers; see :func:`unet_names`.

    Args:
        ch_mult: the first stage's, one entry a level.
        num_res_blocks: residual blocks a level.
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def add(ours: str, theirs: str, layers: Mapping[str, str]) -> None:
        names.update({f"{ours}.{old}": f"{theirs}.{new}" for old, new in layers.items()})

    levels = len(ch_mult)
    for half in ("encoder", "decoder"):
        for old, new in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
            names[f"{half}.{old}"] = f"{half}.{new}"
        add(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RES_BLOCK)
        add(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        add(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RES_BLOCK)
    for level in range(
        levels
    ):  # beyond a half's last level its resampling layer has a name, and no model has the layer
        for index in range(num_res_blocks):
            add(f"encoder.down.{level}.block.{index}", f"encoder.down_blocks.{level}.resnets.{index}", _VAE_RES_BLOCK)
        names[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        # CompVis counts the decoder's levels from the finest, diffusers from the coarsest.
        theirs = f"decoder.up_blocks.{levels - 1 - level}"
        for index in range(num_res_blocks + 1):
            add(f"decoder.up.{level}.block.{index}", f"{theirs}.resnets.{index}", _VAE_RES_BLOCK)
        names[f"decoder.up.{level}.upsample.conv"] = f"{theirs}.upsamplers.0.conv"
    return names


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """Replace the longest beginning of a key that has a new name; None where none has."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = names.get(".".join(parts[:length]))
        if name is not None:
            return ".".join([name, *parts[length:]])
    return None


def _today(key: str) -> str:
    """Give a first stage's key from before 2023 its present name."""
    before, at, layer = key.partition(".attentions.0.")
    name, dot, kind = layer.rpartition(".")
    return f"{before}{at}{_VAE_ATTENTION_BEFORE_2023.get(name, name)}{dot}{kind}" if at else key


def _as_linear(key: str, value: Tensor) -> Tensor:
    """Turn the weight of an attention's 1x1 convolution, (O, I, 1, 1), into a linear layer's, (O, I)."""
    return value[:, :, 0, 0].contiguous() if ".attentions." in key and value.ndim == 4 else value


def _as_convolution(key: str, value: Tensor) -> Tensor:
    """Turn the weight of an attention's linear layer, (O, I), into a 1x1 convolution's, (O, I, 1, 1)."""
    return value[:, :, None, None].contiguous() if ".attn_1." in key and value.ndim == 2 else value


def _section(params: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = params.get(name)
    if not isinstance(section, Mapping) or not isinstance(section.get("params") or {}, Mapping):
        raise ValueError(f"the config has no model.params.{name}, which Stable Diffusion v1 needs")
    return section.get("params") or {}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def foreign_kind(keys: Mapping[str, Any]) -> str | None:
    """Name the kind of model that a file's keys show, where it is not Stable Diffusion v1's.

    Args:
        keys: the weights by key.

    Returns:
        Such as ``a Stable Diffusion 2 checkpoint``, or None.
    """
    signs: list[tuple[str, Callable[[str], bool]]] = [
        ("an SDXL checkpoint", lambda key: key.startswith("conditioner.")),
        ("a Stable Diffusion 2 checkpoint", lambda key: key.startswith("cond_stage_model.model.")),
        ("a Stable Diffusion 3 checkpoint", lambda key: ".joint_blocks." in key),
        ("a Flux checkpoint", lambda key: "double_blocks." in key),
        ("a LoRA, not a whole model", lambda key: key.startswith(("lora_", "lycoris_"))),
        (
            "one part of a diffusers folder (name the folder that holds model_index.json)",
            lambda key: key.startswith(("down_blocks.", "text_model.", "encoder.down_blocks.")),
        ),
    ]
    return next((kind for kind, shows in signs if any(shows(key) for key in keys)), None)


def _foreign_folder(folder: Path) -> str | None:
    """Name the kind of model in a folder, where it is not Stable Diffusion v1's."""
    pipeline = _word(str(_read_json(folder / "model_index.json").get("_class_name", ""))).strip("'")
    if "XL" in pipeline or (folder / "text_encoder_2" / "config.json").is_file():
        return f"an SDXL folder ({pipeline})"
    if (folder / "transformer").is_dir():
        return f"a folder of a transformer model ({pipeline})"
    width = _read_json(folder / "unet" / "config.json").get("cross_attention_dim")
    if width == 1024:
        return "a Stable Diffusion 2 folder (its UNet attends to 1024 channels)"
    if width == 2048:
        return "an SDXL folder (its UNet attends to 2048 channels)"
    return None


def is_diffusers_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder that holds ``model_index.json``."""
    return (Path(path) / "model_index.json").is_file()


def folder_problem(folder: str | Path) -> str | None:
    """Say why a folder cannot be read as a Stable Diffusion v1 model.

    Args:
        folder: a folder with ``model_index.json``.

    Returns:
        One line, or None if nothing is missing and it is no other kind of model.
    """
    folder = Path(folder)
    try:
        kind = _foreign_folder(folder)
    except ValueError as error:
        return str(error)
    if kind is not None:
        return f"'{folder}' is {kind}; this reads Stable Diffusion v1"
    missing = [f"{part}/config.json" for part in PARTS if not (folder / part / "config.json").is_file()]
    missing += [f"{part}/{WEIGHT_FILES[part]}.safetensors" for part in PARTS if _weight_file(folder / part) is None]
    if missing:
        return f"the diffusers folder '{folder}' is not complete: it lacks {', '.join(missing)}; copy it again"
    return None


def _weight_file(part: Path) -> Path | None:
    """Find the file that holds a part's weights, the most precise and safest first."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    names = [f"{stem}{variant}{end}" for variant in ("", ".fp16") for end in (".safetensors", ".bin") for stem in stems]
    names += [f"{name}.index.json" for name in names]
    return next((part / name for name in names if (part / name).is_file()), None)


def read_folder_parts(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read the weights of a diffusers folder.

    Args:
        folder: a folder with ``model_index.json``.

    Returns:
        For each of ``unet``, ``vae`` and ``text_encoder`` its weights under the folder's own names.

    Raises:
        ValueError: it is another kind of model, a part is missing or a file is damaged.
    """
    folder = Path(folder)
    problem = folder_problem(folder)
    if problem is not None:
        raise ValueError(problem)
    return {part: _read_part(folder / part) for part in PARTS}


def _read_part(part: Path) -> dict[str, Tensor]:
    file = _weight_file(part)
    if file is None:
        raise ValueError(f"'{part}' holds no weights")
    if file.suffix != ".json":
        return read_weights(file)
    weights: dict[str, Tensor] = {}
    shards = _read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) and shard for shard in shards.values()):
        raise ValueError(f"'{file}' is damaged: its weight_map does not name a file for each weight; copy it again")
    for shard in sorted(set(shards.values())):
        # A shard lies beside its index: a name that leads elsewhere is not followed.
        weights |= read_weights(part / Path(shard).name)
    return weights


def read_folder(folder: str | Path, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a diffusers folder as a checkpoint's weights.

    Args:
        folder: a folder with ``model_index.json``.
        params: ``model.params`` of the config.

    Returns:
        The weights under checkpoint keys, without schedule tables, which the config computes.

    Raises:
        ValueError: it is another kind of model, incomplete, damaged, or not the one that the config describes.
    """
    folder = Path(folder)
    parts = read_folder_parts(folder)
    layout = FolderFormat(params)
    layout.check_configs(folder)
    weights = layout.to_checkpoint(parts, str(folder))
    if params.get("scale_by_std"):
        scale = _number(_read_json(folder / "vae" / "config.json"), "scaling_factor", 0.18215)
        weights["scale_factor"] = torch.tensor(scale, dtype=torch.float32)
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: it is no JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is damaged: it holds no JSON object; copy it again")
    return content
