"""The perceptual encoder f: the frozen downsampling half of the U-Net, and the small differences of its features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

Features = torch.Tensor | tuple[torch.Tensor, ...]

# Of `Displacement` in float16, in latent standard deviations. Measured on the embedded and on random U-Nets in the
# layouts of SD 1.5 and SDXL (docs/precision.md): shorter, rounding shows; longer, f's curvature does.
STEP_LENGTH = 0.016


def frozen_twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A second module over the same storage: the reference model, free of later adapters.

    LoRA keeps every original parameter object as a `base_layer`, so a twin made before `add_adapter`
    stays the untouched model and costs no memory. Raises ValueError once adapters are there.
    Freezes the shared parameters.
    """
    if getattr(unet, "peft_config", None):
        raise ValueError("the U-Net has adapters already; make its frozen twin before add_adapter")
    unet.requires_grad_(False)
    return copy.deepcopy(unet, memo={id(p): p for p in unet.parameters()}).eval()


class DownBlockEncoder(nn.Module):
    """f(x_t', c, t') of the paper: `conv_in`, the embeddings and the down blocks of a frozen U-Net.

    Call: encoder(sample (N, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), added_cond_kwargs)
    -> the chosen block's output (N, C', H', W') float32, or a tuple of them in the order of `blocks`, computed in the
    weights' dtype. N is a multiple of B: the conditions repeat. Gradients flow to `sample`; the weights have none.
    In float16 each sample's gradient passes through at a scale of its own, so that it neither underflows nor overflows
    whatever the objective's weights are.
    """

    def __init__(self, unet: UNet2DConditionModel, blocks: Sequence[int | str]):
        super().__init__()
        self.unet = unet
        self.blocks = tuple(blocks)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        blocks: Sequence[int | str] = ("last",),
        dtype: torch.dtype | None = None,
    ) -> DownBlockEncoder:
        """An encoder over `unet`'s own storage; make it before adapters are added.

        blocks: down-block indices (0 is the first; text such as "0" will do), "last", or "mid"; the feature of
        a block is what it hands to the next one. dtype: another than the weights' costs a copy of the encoder's part
        of them. Raises ValueError for a block that is not there.
        """
        taps = [normalize_block(b, len(unet.down_blocks)) for b in blocks]
        if not taps or len(set(taps)) < len(taps):
            raise ValueError(f"encoder blocks {taps}: expected at least one, each once")
        twin = frozen_twin(unet)
        if "mid" not in taps:
            del twin.down_blocks[max(int(tap) for tap in taps) + 1 :]
            twin.mid_block = None
        twin.up_blocks = twin.conv_norm_out = twin.conv_out = None
        if dtype not in (None, twin.dtype):
            twin = copy.deepcopy(twin).to(dtype)
        return cls(twin, taps)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.unet.enable_gradient_checkpointing()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> Features:
        unet, dtype, rounds = self.unet, self.unet.dtype, len(sample) // len(timestep)
        scale: dict[str, torch.Tensor] = {}
        scaled = dtype == torch.float16 and sample.requires_grad
        if scaled:
            sample = _Enter.apply(sample.float(), scale)
        sample, text = sample.to(dtype), encoder_hidden_states.to(dtype).repeat(rounds, 1, 1)
        timestep, added = (
            timestep.repeat(rounds),
            {k: v.repeat(rounds, 1) for k, v in (added_cond_kwargs or {}).items()},
        )
        if "text_embeds" in added:
            added["text_embeds"] = added["text_embeds"].to(dtype)
        # The same calls, in the same order, as the first half of UNet2DConditionModel.forward.
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if extra is None else emb + extra
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)

        outputs: dict[int | str, torch.Tensor] = {}
        h = unet.conv_in(sample)
        for index, block in enumerate(unet.down_blocks):
            attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            h, _ = block(hidden_states=h, temb=emb, **attends)
            outputs[index] = h
        if unet.mid_block is not None:
            attends = {"encoder_hidden_states": text} if getattr(unet.mid_block, "has_cross_attention", False) else {}
            outputs["mid"] = unet.mid_block(h, emb, **attends)
        chosen = tuple(outputs[b].float() for b in self.blocks)
        if scaled:
            chosen = _Leave.apply(scale, *chosen)
        return chosen[0] if len(chosen) == 1 else chosen


class _Leave(torch.autograd.Function):
    """The identity of features (N, ...). Backward, each sample's gradient is brought to a largest element near 1."""

    @staticmethod
    def forward(ctx: Any, scale: dict[str, torch.Tensor], *blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.scale = scale
        return tuple(block.view_as(block) for block in blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        largest = torch.stack([g.abs().flatten(1).amax(1) for g in gradients]).amax(0)
        # A power of two, which rounds nothing; a sample without a gradient keeps its zeros.
        ctx.scale["s"] = torch.exp2(torch.log2(largest.clamp_min(2.0**-100)).floor())
        return None, *(g / ctx.scale["s"].view(-1, *[1] * (g.ndim - 1)) for g in gradients)


class _Enter(torch.autograd.Function):
    """The identity of the sample (N, C, H, W); backward it undoes the scale that `_Leave` chose."""

    @staticmethod
    def forward(ctx: Any, sample: torch.Tensor, scale: dict[str, torch.Tensor]) -> torch.Tensor:
        ctx.scale = scale
        return sample.view_as(sample)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale["s"].view(-1, 1, 1, 1), None


def precision_of_f(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """What f is computed in, for a U-Net whose weights are in `weights` on `device`.

    float32 and float16 stay. bfloat16 is too coarse for differences as small as eq. 13's (docs/precision.md); on a GPU
    float16 is as fast, and on a CPU float32 is.
    """
    if weights != torch.bfloat16:
        return weights
    return torch.float32 if device.type == "cpu" else torch.float16


def normalize_block(block: int | str, count: int) -> int | str:
    """A block's index in [0, count), or "mid". Raises ValueError for any other name."""
    if block == "mid":
        return "mid"
    if block == "last":
        return count - 1
    if str(block).isdigit() and int(block) < count:
        return int(block)
    raise ValueError(f"encoder block {block!r}: expected 'last', 'mid' or an index from 0 to {count - 1}")


@dataclass
class Displacement:
    """f(x) - f(target), float32, for x (B, C, H, W) a small step d = x - target away; gradient to x alone.

    secant "1" is eq. 13 as printed, and exact in float32. One DDPM step with the predicted and with the true noise
    differ by 0.4% to 2% of the noise error, which is at or below the rounding of half precision. "auto" is for an f in
    half precision. It takes the difference over a longer step about the same midpoint, and the gradient at x itself:

        value      (f(m + s d / 2) - f(m - s d / 2)) / s,   m = target + d / 2,   s = length / rms(d) per sample
        gradient   of f at x

    near: a point and its displacement, from which "auto" then measures. So policy and reference differ by what was
    measured between them, to a few percent of that however small it is, and not at all if they are equal.

    Even orders of f's curvature cancel in the value. Where d is that long already (large timestep offsets, x0), s = 1,
    and it is eq. 13. A number s above 1 is the one-sided secant (f(target + s d) - f(target)) / s, with the gradient at
    its far end. Several blocks give several differences.

    Every call of f has B rows: in one batch they would round differently, and equal x would not give equal results.
    """

    f: Callable[[torch.Tensor], Features]
    target: torch.Tensor
    secant: str = "auto"
    length: float = STEP_LENGTH

    @cached_property
    def _f_target(self) -> Features:
        with torch.no_grad():
            return self.f(self.target)

    def __call__(self, x: torch.Tensor, near: tuple[torch.Tensor, Features] | None = None) -> Features:
        if self.secant == "auto":
            base, known = near or (self.target, None)
            with torch.no_grad():
                value = _central(self.f, x, base, self.length)
                value = value if known is None else _each(torch.add, value, known)
            return _each(_value_and_gradient, value, self.f(x)) if x.requires_grad else value
        s = float(self.secant)
        # The value of target + s d with d's own gradient: scaled by s it would overflow in float16.
        ahead = self.target + s * (x - self.target).detach() + (x - x.detach()) if s != 1 else x
        return _each(lambda p, q: _value_and_gradient((p.detach() - q) / s, p), self.f(ahead), self._f_target)


def _central(f: Callable[[torch.Tensor], Features], x: torch.Tensor, base: torch.Tensor, length: float) -> Features:
    """f(x) - f(base) from two points on their line, at least `length` apart about their midpoint."""
    middle, d = (base + x) / 2, x - base
    s = (length / d.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)).clamp_min(1)
    ahead, behind = (f(middle + sign * s / 2 * d) for sign in (1, -1))
    return _each(lambda p, q: (p - q) / s.view(-1, *[1] * (p.ndim - 1)), ahead, behind)


def _value_and_gradient(value: torch.Tensor, f_x: torch.Tensor) -> torch.Tensor:
    """`value` with the gradient of `f_x`."""
    return value + (f_x - f_x.detach()) if f_x.requires_grad else value


def _each(operation: Callable[..., torch.Tensor], *features: Features) -> Features:
    if isinstance(features[0], torch.Tensor):
        return operation(*features)
    return tuple(operation(*block) for block in zip(*features, strict=True))
