"""The perceptual encoder f: the frozen downsampling half of the U-Net, without a second copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

Features = torch.Tensor | tuple[torch.Tensor, ...]


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

    Call: encoder(sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), added_cond_kwargs)
    -> the chosen block's output (B, C', H', W'), or a tuple of them in the order of `blocks`, in the
    weights' dtype. Gradients flow to `sample`; the weights have none.
    """

    def __init__(self, unet: UNet2DConditionModel, blocks: Sequence[int | str]):
        super().__init__()
        self.unet = unet
        self.blocks = tuple(blocks)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, blocks: Sequence[int | str] = ("last",)) -> DownBlockEncoder:
        """An encoder over `unet`'s own storage; make it before adapters are added.

        blocks: down-block indices (0 is the first; text such as "0" will do), "last", or "mid"; the feature of
        a block is what it hands to the next one. Raises ValueError for a block that is not there.
        """
        blocks = [normalize_block(b, len(unet.down_blocks)) for b in blocks]
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError(f"encoder blocks {blocks}: expected at least one, each once")
        twin = frozen_twin(unet)
        if "mid" not in blocks:
            del twin.down_blocks[max(blocks) + 1 :]
            twin.mid_block = None
        twin.up_blocks = twin.conv_norm_out = twin.conv_out = None
        return cls(twin, blocks)

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
        unet, dtype = self.unet, self.unet.dtype
        sample, text = sample.to(dtype), encoder_hidden_states.to(dtype)
        added = {k: v.to(dtype) if k == "text_embeds" else v for k, v in (added_cond_kwargs or {}).items()}
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
        chosen = tuple(outputs[b] for b in self.blocks)
        return chosen[0] if len(chosen) == 1 else chosen


def normalize_block(block: int | str, count: int) -> int | str:
    """A block's index in [0, count), or "mid". Raises ValueError for any other name."""
    if block == "mid":
        return "mid"
    if block == "last":
        return count - 1
    if str(block).isdigit() and int(block) < count:
        return int(block)
    raise ValueError(f"encoder block {block!r}: expected 'last', 'mid' or an index from 0 to {count - 1}")


def displacement(
    f: Callable[[torch.Tensor], Features],
    x: torch.Tensor,
    target: torch.Tensor,
    secant: float | str = "auto",
    length: float | torch.Tensor = 0.008,
) -> Features:
    """f(x) - f(target), float32, for x (B, C, H, W) a small step d = x - target away; gradient to x, none to target.

    One DDPM step with the predicted and with the true noise differ by 0.4% to 2% of the noise error, at or below the
    rounding of half precision, so the plain difference is mostly rounding. "auto" takes the derivative of f along d:

        value      (f(target + s d) - f(target - s d)) / 2s,   s = length / rms(d) per sample
        gradient   of f at the target itself, where no difference is taken

    The step is long enough for half precision, and even orders of f's curvature cancel. Where d is that long already
    (large timestep offsets, x0) it is the plain difference, eq. 13. A number s is the one-sided secant
    (f(target + s d) - f(target)) / s; secant 1 is eq. 13 as printed. Several blocks give several differences.
    """
    d = x - target
    if secant != "auto":
        s = float(secant)
        with torch.no_grad():
            origin = f(target)
        return _each(lambda p, q: (p.float() - q.float()) / s, f(target + s * d if s != 1 else x), origin)

    with torch.no_grad():
        s = (length / d.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)).clamp_min(1)
        short = (s > 1).float()
        ahead, behind = f(target + s * d), f(target - short * s * d)
        value = _each(lambda p, q: _over(p.float() - q.float(), s * (1 + short)), ahead, behind)
    if not d.requires_grad:
        return value
    here = f(target + (1 - short) * d.detach() + (d - d.detach()))
    return _each(lambda v, h: v + (h.float() - h.detach().float()), value, here)


def step_length(dtype: torch.dtype, abar: torch.Tensor) -> torch.Tensor:
    """The `length` of `displacement` that suits an encoder in `dtype` at noise levels abar (B, 1, 1, 1), same shape.

    Long enough for the rounding, short enough for f's curvature, which is stronger at high noise. Fitted on the
    embedded pipeline (tiny/precision.py), where any of 0.006 to 0.01 will do in float16.
    """
    if dtype == torch.bfloat16:
        return (0.013 + 0.012 * abar.sqrt()).float()
    return torch.full_like(abar, 0.008, dtype=torch.float32)


def _each(operation: Callable[..., torch.Tensor], *features: Features) -> Features:
    if isinstance(features[0], torch.Tensor):
        return operation(*features)
    return tuple(operation(*block) for block in zip(*features, strict=True))


def _over(features: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Features (B, ...) over one number per sample."""
    return features / divisor.view(-1, *[1] * (features.ndim - 1))
