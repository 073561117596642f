"""The convolutional encoder and decoder of the first stage, with the lineage's layer names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import LinearAttention, SpatialSelfAttention


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Build the first stage's normalisation: epsilon 1e-6."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then convolve if asked."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution (padded on the right and bottom), or by averaging."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.conv is None:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Residual block of two convolutions, optionally shifted by a timestep embedding.

    Args:
        in_channels: input channels.
        out_channels: output channels, ``in_channels`` if None.
        conv_shortcut: where the channels change, use a 3x3 instead of a 1x1 convolution on the skip path.
        dropout: probability before the second convolution.
        temb_channels: width of the timestep embedding; 0 for none.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


AttnBlock = SpatialSelfAttention


def make_attn(in_channels: int, attn_type: str = "vanilla") -> nn.Module:
    """Build the attention of one level.

    Args:
        in_channels: channels of the features.
        attn_type: ``vanilla`` (single head, softmax over all positions), ``linear``, or ``none``.

    Raises:
        ValueError: unknown type.
    """
    if attn_type == "vanilla":
        return AttnBlock(in_channels)
    if attn_type == "linear":
        return LinearAttention(in_channels, heads=1, dim_head=in_channels)
    if attn_type == "none":
        return nn.Identity()
    raise ValueError(f"attn_type '{attn_type}' is unknown; use vanilla, linear or none")


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, attn_type: str) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout)
        self.attn_1 = make_attn(channels, attn_type)
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """Residual blocks (each followed by attention, where there is any) and a resampling layer."""

    def __init__(self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Encoder(nn.Module):
    """Encoder from pictures to features of the latent's resolution.

    Args:
        ch: channels of the first level.
        out_ch: channels of the pictures that the decoder makes; unused here.
        ch_mult: channels of each level as multiples of ``ch``; each level but the last halves the size.
        num_res_blocks: residual blocks per level.
        attn_resolutions: resolutions (pixels, counted from ``resolution``) that get attention.
        dropout: probability inside residual blocks.
        resamp_with_conv: resample with convolutions.
        in_channels: channels of the pictures.
        resolution: height and width of the pictures, from which levels are counted.
        z_channels: channels of the features.
        double_z: give twice as many, for means and log-variances.
        use_linear_attn: use linear attention, whatever ``attn_type`` says.
        attn_type: ``vanilla``, ``linear`` or ``none``.

    Reference:
        Esser et al. 2021, arXiv 2012.09841, table 7; Rombach et al. 2022, arXiv 2112.10752, section 3.1.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels, current_resolution = ch, resolution
        for level, mult in enumerate(ch_mult):
            blocks: list[nn.Module] = []
            attentions: list[nn.Module] = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock(in_channels=channels, out_channels=ch * mult, dropout=dropout))
                channels = ch * mult
                if current_resolution in attn_resolutions:
                    attentions.append(make_attn(channels, attn_type))
            stage = _Level(blocks, attentions)
            if level < len(ch_mult) - 1:
                stage.downsample = Downsample(channels, resamp_with_conv)
                current_resolution //= 2
            self.down.append(stage)
        self.mid = _Middle(channels, dropout, attn_type)
        self.norm_out = Normalize(channels)
        self.conv_out = nn.Conv2d(channels, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, in_channels, H, W) in [-1, 1] to (B, z_channels or twice that, H/f, W/f)."""
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Decoder from latents to pictures: the encoder's mirror, one residual block more on each level.

    Args:
        ch, out_ch, ch_mult, num_res_blocks, attn_resolutions, dropout, resamp_with_conv, in_channels,
        resolution, z_channels, use_linear_attn, attn_type: as in :class:`Encoder`.
        give_pre_end: return the features before the last norm and convolution.
        tanh_out: squash the output into [-1, 1].
        double_z: accepted because both halves share one ``ddconfig``; unused here.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        double_z: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
    ) -> None:
        super().__init__()
        attn_type = "linear" if use_linear_attn else attn_type
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        channels = ch * ch_mult[-1]
        current_resolution = resolution // 2 ** (len(ch_mult) - 1)
        self.z_shape = (1, z_channels, current_resolution, current_resolution)
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _Middle(channels, dropout, attn_type)
        stages: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            blocks: list[nn.Module] = []
            attentions: list[nn.Module] = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock(in_channels=channels, out_channels=ch * mult, dropout=dropout))
                channels = ch * mult
                if current_resolution in attn_resolutions:
                    attentions.append(make_attn(channels, attn_type))
            stage = _Level(blocks, attentions)
            if level > 0:
                stage.upsample = Upsample(channels, resamp_with_conv)
                current_resolution *= 2
            stages.append(stage)
        # Checkpoints number the levels from the highest resolution, the forward pass runs from the lowest.
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out = Normalize(channels)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, z_channels, h, w) to (B, out_ch, h*f, w*f), about within [-1, 1]."""
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
