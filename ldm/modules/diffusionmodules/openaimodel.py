"""The diffusion UNet, with the layer names of the Stable Diffusion checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A layer whose forward also takes the timestep embedding."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands each child what it takes: timestep embedding, context, the size to grow to, or none."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Run the children in order.

        Args:
            x: (B, C, H, W) features.
            emb: (B, E) timestep embedding.
            context: (B, L, D) tokens for the transformers.
            size: height and width that the up-sampling child shall give; twice the input's if None.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, size)
            elif isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Double the height and width (or nearly so) by nearest neighbour, then convolve if asked.

    Args:
        channels: input channels.
        use_conv: apply a 3x3 convolution.
        dims: 1, 2 or 3 signal dimensions; with 3 the first is not doubled.
        out_channels: output channels of the convolution, ``channels`` if None.
        padding: of the convolution.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=padding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Enlarge.

        Args:
            x: (B, C, H, W).
            size: height and width to give; twice those of x if None. A level of odd height or width has halved to a
                size whose double is not it.

        Returns:
            (B, C', *size).
        """
        if size is None:
            scale = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
            x = F.interpolate(x, scale_factor=scale, mode="nearest")
        else:
            x = F.interpolate(x, size=list(size), mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the height and width by a strided convolution or by averaging.

    Args:
        channels: input channels.
        use_conv: use a strided 3x3 convolution; otherwise average 2x2.
        dims: 1, 2 or 3 signal dimensions; with 3 the first is not halved.
        out_channels: output channels of the convolution, ``channels`` if None.
        padding: of the convolution.
    """

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=padding)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2)."""
        return self.op(x)


class ResBlock(TimestepBlock):
    """Residual block of two convolutions, shifted (or scaled and shifted) by the timestep embedding.

    Args:
        channels: input channels.
        emb_channels: width of the timestep embedding.
        dropout: probability before the second convolution.
        out_channels: output channels, ``channels`` if None.
        use_conv: where the channels change, use a 3x3 instead of a 1x1 convolution on the skip path.
        use_scale_shift_norm: let the embedding scale and shift the second norm's output.
        dims: 1, 2 or 3 signal dimensions.
        use_checkpoint: recompute activations in the backward pass.
        up, down: resample inside the block.

    Reference:
        Dhariwal & Nichol 2021, arXiv 2105.05233, section 3.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.channels = channels
        self.out_channels = out_channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dropout = dropout
        self.updown = up or down

        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.h_upd: nn.Module = nn.Identity()
        self.x_upd: nn.Module = nn.Identity()
        if self.updown:
            resample = Upsample if up else Downsample
            self.h_upd, self.x_upd = resample(channels, False, dims), resample(channels, False, dims)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Apply the block to (B, C, H, W) features under a (B, E) embedding; see :class:`Upsample` for ``size``."""
        return checkpoint(self._forward, (x, emb, size), flag=self.use_checkpoint, draws_random=self.dropout > 0)

    def _forward(self, x: Tensor, emb: Tensor, size: Sequence[int] | None = None) -> Tensor:
        in_norm, activation, in_conv = self.in_layers
        h = activation(in_norm(x))
        if isinstance(self.h_upd, Upsample) and isinstance(self.x_upd, Upsample):
            h, x = self.h_upd(h, size), self.x_upd(x, size)
        else:
            h, x = self.h_upd(h), self.x_upd(x)
        h = in_conv(h)
        shift = self.emb_layers(emb).type(h.dtype)
        shift = shift.reshape(*shift.shape, *([1] * (h.ndim - 2)))
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            out_norm, activation, dropout, out_conv = self.out_layers
            h = out_conv(dropout(activation(out_norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, with a residual.

    Args:
        channels: channels of the features.
        num_heads: number of heads, where ``num_head_channels`` is -1.
        num_head_channels: width of each head.
        use_checkpoint: recompute activations in the backward pass.
        use_new_attention_order: the projection's channels are ordered (query/key/value, head, channel)
            instead of (head, query/key/value, channel).

    Raises:
        ValueError: the channels do not divide by ``num_head_channels``.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"{channels} channels do not divide by num_head_channels {num_head_channels}")
            num_heads = channels // num_head_channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of (B, C, ...)."""
        return checkpoint(self._forward, (x,), flag=self.use_checkpoint, draws_random=False)

    def _forward(self, x: Tensor) -> Tensor:
        batch, channels, *spatial = x.shape
        tokens = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(tokens))
        if self.use_new_attention_order:
            q, k, v = qkv.reshape(batch, 3, self.num_heads, -1, qkv.shape[-1]).unbind(1)
        else:
            q, k, v = qkv.reshape(batch, self.num_heads, 3, -1, qkv.shape[-1]).unbind(2)
        out = F.scaled_dot_product_attention(q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous())
        out = out.mT.reshape(batch, channels, -1)
        return (tokens + self.proj_out(out)).reshape(batch, channels, *spatial)


class UNetModel(nn.Module):
    """UNet over latents with timestep embedding, attention and cross-attention to a context.

    Args:
        image_size: height and width the model was made for, in latent cells; informative only.
        in_channels: channels of the input (latent plus concatenated condition).
        model_channels: channels of the first level.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per level.
        attention_resolutions: down-sampling factors at which attention is used.
        dropout: probability inside residual blocks.
        channel_mult: channels of each level as multiples of ``model_channels``.
        conv_resample: resample with convolutions between levels.
        dims: 1, 2 or 3 signal dimensions.
        num_classes: number of classes for class-conditional models, else None.
        use_checkpoint: recompute activations in the backward pass: slower, and smaller in memory. A number between 0
            and 1 does so in that share of the blocks alone, those of the highest resolution first, which hold most.
        use_fp16: refused: precision is the trainer's affair.
        num_heads: attention heads, where ``num_head_channels`` is -1.
        num_head_channels: width of each head.
        num_heads_upsample: heads in the decoder's plain attention, ``num_heads`` if -1.
        use_scale_shift_norm: let the timestep scale and shift norms instead of only shifting features.
        resblock_updown: resample inside residual blocks.
        use_new_attention_order: channel order of plain attention.
        use_spatial_transformer: use transformers (with context) instead of plain attention.
        transformer_depth: blocks in each transformer.
        context_dim: width of the context.
        n_embed: predict this many codebook ids instead of a latent.
        legacy: derive the head width from ``num_heads`` for transformers, as the first LDM models did.

    Raises:
        ValueError: heads are not given, context and transformer do not go together, a share of blocks that is none,
            or ``use_fp16``.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752, section 3.2; Dhariwal & Nichol 2021, arXiv 2105.05233.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool | float = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        if use_fp16:
            raise ValueError("unet_config: use_fp16 is not supported; set lightning.trainer.precision to 16-mixed")
        if use_spatial_transformer != (context_dim is not None):
            raise ValueError("unet_config: use_spatial_transformer and context_dim are needed together")
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("unet_config: give num_heads or num_head_channels")
        if not 0 <= use_checkpoint <= 1:
            raise ValueError(
                f"unet_config: use_checkpoint is {use_checkpoint}; use true, false, or a share of blocks from 0 to 1"
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.predict_codebook_ids = n_embed is not None
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads

        blocks: list[tuple[int, nn.Module]] = []  # with the factor by which each one's features are smaller

        def res_block(channels: int, out: int, up: bool = False, down: bool = False) -> ResBlock:
            block = ResBlock(
                channels,
                time_embed_dim,
                dropout,
                out_channels=out,
                dims=dims,
                use_scale_shift_norm=use_scale_shift_norm,
                up=up,
                down=down,
            )
            blocks.append((factor, block))
            return block

        def attention(channels: int, plain_heads: int) -> nn.Module:
            if num_head_channels == -1:
                heads, head_width = num_heads, channels // num_heads
            else:
                heads, head_width = channels // num_head_channels, num_head_channels
            if use_spatial_transformer:
                transformer = SpatialTransformer(
                    channels,
                    heads,
                    channels // heads if legacy else head_width,
                    depth=transformer_depth,
                    context_dim=context_dim,
                    use_checkpoint=False,
                )
                blocks.extend((factor, block) for block in transformer.transformer_blocks)
                return transformer
            block = AttentionBlock(
                channels,
                num_heads=plain_heads,
                num_head_channels=num_head_channels if legacy else head_width,
                use_new_attention_order=use_new_attention_order,
            )
            blocks.append((factor, block))
            return block

        time_embed_dim = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, time_embed_dim), nn.SiLU(), linear(time_embed_dim, time_embed_dim)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time_embed_dim)

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, model_channels, 3, padding=1))]
        )
        skip_channels = [model_channels]
        channels, factor = model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(channels, mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                down = (
                    res_block(channels, channels, down=True)
                    if resblock_updown
                    else Downsample(channels, conv_resample, dims=dims)
                )
                self.input_blocks.append(TimestepEmbedSequential(down))
                skip_channels.append(channels)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(
            res_block(channels, channels), attention(channels, num_heads), res_block(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for index in range(num_res_blocks + 1):
                layers = [res_block(channels + skip_channels.pop(), mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels, num_heads_upsample))
                if level > 0 and index == num_res_blocks:
                    layers.append(
                        res_block(channels, channels, up=True)
                        if resblock_updown
                        else Upsample(channels, conv_resample, dims=dims)
                    )
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(channels),
            nn.SiLU(),
            zero_module(conv_nd(dims, model_channels, out_channels, 3, padding=1)),
        )
        if n_embed is not None:
            self.id_predictor = nn.Sequential(normalization(channels), conv_nd(dims, model_channels, n_embed, 1))
        blocks.sort(key=lambda block: block[0])
        for _, recomputed in blocks[: math.ceil(use_checkpoint * len(blocks))]:
            if isinstance(recomputed, BasicTransformerBlock):
                recomputed.checkpoint = True
            elif isinstance(recomputed, (ResBlock, AttentionBlock)):
                recomputed.use_checkpoint = True

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predict the noise (or what the model was trained for).

        Args:
            x: (B, C, H, W) noisy latents; any height and width.
            timesteps: (B,).
            context: (B, L, context_dim) conditioning tokens.
            y: int64 (B,) class labels, for class-conditional models alone.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: labels are missing, or given to a model without classes.
        """
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y must be given exactly where the UNet has num_classes")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).type(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)

        h = x
        skips: list[Tensor] = []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            # The next features to join give the size: a level of odd height or width is not twice the one below it.
            h = block(h, emb, context, size=skips[-1].shape[2:] if skips else None)
        return self.id_predictor(h) if self.predict_codebook_ids else self.out(h)
