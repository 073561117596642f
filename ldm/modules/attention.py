"""Attention layers: the transformer that conditions the UNet on text, and the plain spatial variants."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import checkpoint, zero_module


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate: (..., dim_in) -> (..., dim_out).

    Reference:
        Shazeer 2020, arXiv 2002.05202, eq. 6.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """Project to value and gate, and multiply them."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron of a transformer block: (..., dim) -> (..., dim_out).

    Args:
        dim: input width.
        dim_out: output width, ``dim`` if None.
        mult: hidden width as a multiple of ``dim``.
        glu: use :class:`GEGLU` instead of a plain linear layer with GELU.
        dropout: probability on the hidden layer.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim * mult
        project_in = GEGLU(dim, inner_dim) if glu else nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner_dim, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the perceptron."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from queries to a context, or to the queries themselves.

    Args:
        query_dim: width of the queries.
        context_dim: width of the context, ``query_dim`` if None.
        heads: number of heads.
        dim_head: width of each head.
        dropout: probability on the output.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752, section 3.3; Vaswani et al. 2017, arXiv 1706.03762, eq. 1.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, query_dim).
            context: (B, L, context_dim); ``x`` if None.
            mask: bool, B x L in any further shape; False hides a context position.

        Returns:
            (B, N, query_dim).
        """
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )  # each (B, heads, N or L, dim_head)
        visible = None if mask is None else mask.reshape(mask.shape[0], 1, 1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.to_out(out.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and a perceptron, each behind a layer norm and a residual.

    Args:
        dim: token width.
        n_heads: number of heads.
        d_head: width of each head.
        dropout: probability in attention and perceptron.
        context_dim: width of the context.
        gated_ff: use GEGLU in the perceptron.
        checkpoint: recompute activations in the backward pass.
        disable_self_attn: let the first attention look at the context too.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        first_context_dim = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first_context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint
        self.dropout = dropout

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform (B, N, dim) tokens under a (B, L, context_dim) context."""
        return checkpoint(self._forward, (x, context), flag=self.checkpoint, draws_random=self.dropout > 0)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map, conditioned on a context.

    Args:
        in_channels: channels of the feature map.
        n_heads: number of heads.
        d_head: width of each head.
        depth: number of transformer blocks.
        dropout: probability inside the blocks.
        context_dim: width of the context.
        disable_self_attn: let the first attention of each block look at the context too.
        use_checkpoint: recompute the blocks' activations in the backward pass.

    Reference:
        Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        disable_self_attn: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        self.in_channels = in_channels
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner_dim, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=context_dim,
                checkpoint=use_checkpoint,
                disable_self_attn=disable_self_attn,
            )
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, kernel_size=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform a (B, C, H, W) feature map under a (B, L, context_dim) context."""
        # Contiguous both ways: a transposed view would pass for the channels-last layout in what follows.
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # (B, H * W, inner_dim)
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()) + x


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual.

    The autoencoder's attention (where it is called ``AttnBlock``).
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (B, C, H, W)."""
        height = x.shape[2]
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        # Contiguous operands are needed by the fused kernels, and the transposed view of a convolution is not.
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=height)) + x


class LinearAttention(nn.Module):
    """Attention with the softmax over keys alone, linear in the number of positions.

    Args:
        dim: channels of the feature map.
        heads: number of heads.
        dim_head: width of each head.

    Reference:
        Shen et al. 2018, arXiv 1812.01243, section 3.2.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, dim_head * heads * 3, kernel_size=1, bias=False)
        self.to_out = nn.Conv2d(dim_head * heads, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (B, C, H, W)."""
        height = x.shape[2]
        q, k, v = rearrange(self.to_qkv(x), "b (three h d) y x -> three b h d (y x)", three=3, h=self.heads)
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(rearrange(out, "b h e (y x) -> b (h e) y x", y=height))
