"""Encoders that turn a condition (captions, class labels, maps) into what the UNet attends to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.modules.encoders.tokenizer import MOST_CHUNKS, build_tokenizer, caption_ids, split_into_chunks

logger = logging.getLogger(__name__)

CLIP_VIT_L_14_TEXT: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
"""The numbers of Stable Diffusion v1's text encoder, openai/clip-vit-large-patch14."""


class AbstractEncoder(nn.Module):
    """Base of the encoders: ``encode`` is what the diffusion model calls."""

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode a condition."""
        return self(*args, **kwargs)


class IdentityEncoder(AbstractEncoder):
    """Hands the condition on as it is."""

    def encode(self, x: Any) -> Any:
        """Return the argument."""
        return x


class ClassEmbedder(nn.Module):
    """Embeds class labels as one-token contexts.

    Args:
        embed_dim: width of the embedding.
        n_classes: number of classes.
        key: name of the labels in the batch.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None) -> Tensor:
        """Embed ``batch[key]``, int64 (B,), as (B, 1, embed_dim)."""
        return self.embedding(batch[key or self.key][:, None])


class SpatialRescaler(nn.Module):
    """Resamples a spatial condition by halving (or another factor), and optionally changes its channels.

    Args:
        n_stages: how often to resample.
        method: torch's interpolation mode.
        multiplier: factor of each resampling.
        in_channels: channels of the condition.
        out_channels: channels after a 1x1 convolution; no convolution if None.
        bias: whether the convolution has one.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_stages = n_stages
        self.interpolator = partial(F.interpolate, mode=method, scale_factor=multiplier)
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H * multiplier**n_stages, ...)."""
        for _ in range(self.n_stages):
            x = self.interpolator(x)
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def encode(self, x: Tensor) -> Tensor:
        """Apply the rescaler."""
        return self(x)


class _TextTransformer(nn.Module):
    """Holds the text model one level down, where checkpoints have it (``transformer.text_model``)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(config)


class FrozenCLIPEmbedder(AbstractEncoder):
    """CLIP's text encoder: captions to the sequence of last hidden states.

    Built from numbers, never downloaded; its weights come from the checkpoint. In spite of its name it is
    trained where ``cond_stage_trainable`` says so: that name is a contract.

    Long captions: with ``long_captions: chunk`` a caption of more than 75 tokens becomes up to three chunks, each with
    begin and end of its own and encoded by itself; their hidden states are put one behind the other, as web UIs do. In
    a batch of captions of several lengths, each one's states are repeated whole up to the least common multiple of the
    lengths. No mask is needed: among k copies of the same keys each copy gets 1/k of the attention that one alone
    would get, so what is attended to is the same, and so is a picture's gradient, whatever is in its batch.

    Args:
        version: the model whose numbers to use; only ``openai/clip-vit-large-patch14`` is known.
        device: accepted for CompVis configs; the module lives where its parameters are.
        max_length: tokens of each encoded caption, begin and end included.
        text_config: numbers of another CLIP text model (fields of ``transformers.CLIPTextConfig``).
        freeze: never train this encoder, whatever ``cond_stage_trainable`` says.
        layer: ``last`` (hidden states after the last layer norm), ``hidden`` (hidden states of the layer
            ``layer_idx``, as they are) or ``pooled`` (the end token's state alone, as one token).
        layer_idx: which hidden states, for ``hidden``: 0 the embeddings, -1 the last layer's.
        clip_skip: leave out that many of the last layers, for ``last``; models trained with web UIs' "clip skip 2"
            need 1.
        long_captions: ``cut`` leaves out what goes beyond one chunk of ``max_length`` tokens; ``chunk`` encodes up to
            three.

    Raises:
        ValueError: unknown ``version`` without ``text_config``, more tokens than positions or less than 3, a layer
            that is not there, or another word for ``long_captions``.

    Reference:
        Radford et al. 2021, arXiv 2103.00020, section 2.4.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        freeze: bool = False,
        layer: str = "last",
        layer_idx: int | None = None,
        clip_skip: int = 0,
        long_captions: Literal["cut", "chunk"] = "cut",
    ) -> None:
        super().__init__()
        if long_captions not in ("cut", "chunk"):
            raise ValueError(f"cond_stage_config: long_captions is '{long_captions}'; use cut or chunk")
        if text_config is None:
            if version != "openai/clip-vit-large-patch14":
                raise ValueError(
                    f"cond_stage_config: version '{version}' is unknown and nothing is downloaded; "
                    "give its numbers as text_config (hidden_size, num_hidden_layers, …)"
                )
            text_config = CLIP_VIT_L_14_TEXT
        config = CLIPTextConfig(**{**text_config})
        if max_length > config.max_position_embeddings:
            raise ValueError(
                f"cond_stage_config: max_length {max_length} is above the text encoder's "
                f"{config.max_position_embeddings} positions"
            )
        if max_length < 3:
            raise ValueError(
                f"cond_stage_config: max_length {max_length} leaves no room for a caption; give at least 3"
            )
        _check_layer(layer, layer_idx, clip_skip, config.num_hidden_layers)
        self.layer = layer
        self.layer_idx = layer_idx
        self.clip_skip = clip_skip
        self.long_captions = long_captions
        self.most_chunks = MOST_CHUNKS if long_captions == "chunk" else 1
        self.max_length = max_length
        self.transformer = _TextTransformer(config)
        self.frozen = freeze
        if freeze:
            self.freeze()
        self._reported_captions: set[str] = set()

    def freeze(self) -> None:
        """Switch to evaluation mode, and ask for no gradients, for good."""
        self.frozen = True
        self.eval()
        self.requires_grad_(False)

    def freeze_embeddings(self) -> None:
        """Ask for no gradients of the token and position embeddings."""
        self.transformer.text_model.embeddings.requires_grad_(False)

    def train_last_layers(self, count: int) -> None:
        """Ask for gradients of the last layers alone, and of the final layer norm where that is used.

        Args:
            count: layers, counted back from the last that the hidden states go through: ``clip_skip`` and
                ``layer_idx`` leave some out.

        Raises:
            ValueError: there are not as many.
        """
        text_model = self.transformer.text_model
        layers = list(text_model.encoder.layers)
        if self.layer == "hidden":
            assert self.layer_idx is not None  # _check_layer
            used = self.layer_idx if self.layer_idx >= 0 else len(layers) + 1 + self.layer_idx
        else:
            used = len(layers) - self.clip_skip
        if not 1 <= count <= used:
            raise ValueError(
                f"model.params.cond_train_last_layers is {count}; it must lie within 1 and {used}, the text encoder's "
                "layers that are used"
            )
        self.requires_grad_(False)
        for layer in layers[used - count : used]:
            layer.requires_grad_(True)
        if self.layer != "hidden":
            text_model.final_layer_norm.requires_grad_(True)

    @property
    def most_caption_tokens(self) -> int:
        """Most tokens of a caption that are encoded, begin and end tokens left out; what goes beyond is cut."""
        return (self.max_length - 2) * self.most_chunks

    def cut_captions(self, captions: Sequence[str]) -> dict[str, str]:
        """Find captions that are too long; :meth:`tokenize` then cuts them without naming them once more.

        Args:
            captions: texts.

        Returns:
            What each such caption loses, by caption.
        """
        tokenizer = build_tokenizer()
        cut = {}
        captions = list(captions)
        for caption, ids in zip(captions, caption_ids(captions), strict=True):
            if len(ids) > self.most_caption_tokens:
                cut[caption] = tokenizer.decode(ids[self.most_caption_tokens :]).strip()
        self._reported_captions.update(cut)
        return cut

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Turn captions into token ids; a caption that is too long is cut, and named in a warning.

        Args:
            captions: B texts; an empty one is the unconditional prompt.

        Returns:
            int64 (B, max_length) on the CPU: begin token, text, then end tokens up to the length. With
            ``long_captions: chunk`` as many such chunks in a row as the batch needs: (B, n * max_length).
        """
        chunks, order = self._tokenize_chunks(captions)
        return chunks[order].flatten(1)

    def _tokenize_chunks(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn captions into chunks of token ids.

        Args:
            captions: B texts.

        Returns:
            int64 (chunks, max_length), all captions' chunks; and int64 (B, n), which of them make up each caption,
            repeated whole to one length.
        """
        tokenizer = build_tokenizer()
        rows: list[list[int]] = []
        numbers: list[range] = []
        for caption, ids in zip(captions, caption_ids(captions), strict=True):
            if len(ids) > self.most_caption_tokens and caption not in self._reported_captions:
                self._reported_captions.add(caption)
                logger.warning(
                    "caption of %d tokens cut to %d: '%s' loses '%s'",
                    len(ids),
                    self.most_caption_tokens,
                    caption,
                    tokenizer.decode(ids[self.most_caption_tokens :]).strip(),
                )
            first = len(rows)
            for chunk in split_into_chunks(ids, self.max_length - 2, self.most_chunks):
                begun = [tokenizer.bos_token_id, *chunk]
                rows.append(begun + [tokenizer.eos_token_id] * (self.max_length - len(begun)))
            numbers.append(range(first, len(rows)))
        together = math.lcm(*map(len, numbers))
        order = [list(each) * (together // len(each)) for each in numbers]
        return torch.tensor(rows, dtype=torch.int64), torch.tensor(order, dtype=torch.int64)

    def forward(self, text: str | Sequence[str] | Tensor) -> Tensor:
        """Encode captions, or token ids that are there already.

        Args:
            text: one caption, B captions, or int64 (B, L) token ids; with ``long_captions: chunk`` more than
                ``max_length`` of these are chunks in a row, as :meth:`tokenize` gives them.

        Returns:
            (B, L, hidden_size) hidden states, or (B, 1, hidden_size) for ``pooled``; with ``long_captions: chunk``
            n times as many, n being the least common multiple of the captions' chunks.

        Raises:
            ValueError: token ids that are no whole number of chunks.
        """
        if isinstance(text, Tensor):
            if self.most_chunks == 1 or text.shape[1] <= self.max_length:
                return self._encode(text)
            if text.shape[1] % self.max_length:
                raise ValueError(
                    f"{text.shape[1]} token ids are no whole number of chunks of {self.max_length}; give the output of "
                    "tokenize()"
                )
            return self._encode(text.reshape(-1, self.max_length)).unflatten(0, (len(text), -1)).flatten(1, 2)
        chunks, order = self._tokenize_chunks([text] if isinstance(text, str) else text)
        if len(chunks) == len(order):
            return self._encode(chunks)
        return self._encode(chunks)[self._to_device(order)].flatten(1, 2)

    @property
    def _device(self) -> torch.device:
        return self.transformer.text_model.embeddings.token_embedding.weight.device

    def _to_device(self, numbers: Tensor) -> Tensor:
        """Move numbers from the CPU without waiting for the device, as copying from pageable memory would."""
        device = self._device
        if device.type == "cuda" and not numbers.is_cuda:
            numbers = numbers.pin_memory()
        return numbers.to(device, non_blocking=True)

    def _encode(self, tokens: Tensor) -> Tensor:
        """Encode chunks of token ids (N, L) to hidden states (N, L, hidden_size), or (N, 1, hidden_size)."""
        tokens = self._to_device(tokens)
        text_model = self.transformer.text_model
        if self.layer == "last" and self.clip_skip == 0:
            return text_model(input_ids=tokens).last_hidden_state
        output = text_model(input_ids=tokens, output_hidden_states=True)
        if self.layer == "pooled":
            return output.pooler_output[:, None]
        if self.layer == "hidden":
            return output.hidden_states[self.layer_idx]
        return text_model.final_layer_norm(output.hidden_states[-1 - self.clip_skip])


def _check_layer(layer: str, layer_idx: int | None, clip_skip: int, layers: int) -> None:
    """Refuse a choice of hidden states that is not there."""
    if layer not in ("last", "hidden", "pooled"):
        raise ValueError(f"cond_stage_config: layer is '{layer}'; use last, hidden or pooled")
    if (layer == "hidden") != (layer_idx is not None):
        raise ValueError("cond_stage_config: layer: hidden and layer_idx are needed together")
    if layer_idx is not None and not -layers - 1 <= layer_idx <= layers:
        raise ValueError(f"cond_stage_config: layer_idx is {layer_idx}; it must lie within {-layers - 1} and {layers}")
    if not 0 <= clip_skip < layers or (clip_skip and layer != "last"):
        raise ValueError(
            f"cond_stage_config: clip_skip is {clip_skip}; it must lie within 0 and {layers - 1}, with layer: last"
        )
