"""The perceptual encoder f (the frozen first part of a U-Net or transformer), and small differences of its features."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Features = torch.Tensor | tuple[torch.Tensor, ...]

# Length of the step of `Displacement` in float16, in latent standard deviations. Measured on the embedded U-Net and on
# random ones in the layouts of SD 1.5 and SDXL (docs/precision.md). With a shorter step rounding errors grow, with a
# longer one the error from f's curvature.
STEP_LENGTH = 0.016


def frozen_twin(model: Any) -> Any:
    """A second module over the same parameters and buffers: the reference model, which later adapters do not change.

    LoRA keeps every original parameter object as a `base_layer`. So a twin made before `add_adapter` stays
    the original model and costs no memory. Freezes the shared parameters. Raises ValueError if the model has adapters.
    """
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters already; make its frozen twin before add_adapter")
    model.requires_grad_(False)
    return copy.deepcopy(model, memo={id(t): t for t in (*model.parameters(), *model.buffers())}).eval()


class Encoder(nn.Module, ABC):
    """f(x_t', c, t') of the paper: the first part of a frozen model, a U-Net's down blocks or a transformer's blocks.

    Call: encoder(sample (N, C, H, W), timestep (B,), encoder_hidden_states (B, S, D), and the model's other conditions)
    -> the chosen block's output (N, ...) float32, or a tuple of them in the order of `blocks`, computed in the
    weights' dtype. N is a multiple of B: the conditions repeat. Gradients flow to `sample`; the weights have none.
    In float16 the backward pass scales each sample's gradient separately, so that it neither underflows nor overflows,
    for any weights of the objective.
    """

    def __init__(self, model: Any, blocks: Sequence[int | str]):
        super().__init__()
        self.model = model
        self.blocks = tuple(blocks)

    @classmethod
    def from_model(cls, model: Any, blocks: Sequence[int | str] = ("last",), dtype: torch.dtype | None = None) -> Any:
        """An encoder that shares `model`'s storage; make it before adapters are added.

        blocks: see `tap`; also "sample", the input itself, which separates what f sees from how eq. 13 weighs
        timesteps. The feature of a block is its output to the next block. dtype: if it differs from the weights', the
        encoder's part of them is copied. Raises ValueError for a block that does not exist.
        """
        taps = [cls.tap(b, model.config) for b in blocks]
        if not taps or len(set(taps)) < len(taps):
            raise ValueError(f"encoder blocks {taps}: expected at least one, each once")
        twin = frozen_twin(model)
        cls.cut(twin, max((tap for tap in taps if isinstance(tap, int)), default=-1) + 1, taps)
        if dtype not in (None, twin.dtype):
            twin = copy.deepcopy(twin).to(dtype)
        return cls(twin, taps)

    @classmethod
    def tap(cls, block: int | str, config: Mapping[str, Any]) -> int | str:
        """The key of a block's output: its index (text such as "0" is accepted), or what its name stands for.

        config: the model's. Raises ValueError for a block that the model does not have.
        """
        count, names = cls.named(config)
        names = {**names, "sample": "sample"}
        if block in names:
            return names[str(block)]
        if str(block).isdigit() and int(block) < count:
            return int(block)
        expected = ", ".join(map(repr, names))
        raise ValueError(f"encoder block {block!r}: expected {expected} or an index from 0 to {count - 1}")

    @staticmethod
    @abstractmethod
    def named(config: Mapping[str, Any]) -> tuple[int, dict[str, int | str]]:
        """The number of blocks of a model with this config, and what the names of blocks stand for."""

    @staticmethod
    @abstractmethod
    def cut(twin: Any, depth: int, taps: Sequence[int | str]) -> None:
        """Removes what f does not need from a model, in place: all but its first `depth` blocks, and the rest."""

    @abstractmethod
    def outputs(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, conditions: dict[str, Any]
    ) -> dict[int | str, torch.Tensor]:
        """The output of each block, in the weights' dtype. All inputs have the same number of rows."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.model.enable_gradient_checkpointing()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **conditions: Any
    ) -> Features:
        rounds = len(sample) // len(timestep)
        scale: dict[str, torch.Tensor] = {}
        scaled = self.dtype == torch.float16 and sample.requires_grad
        if scaled:
            sample = _Enter.apply(sample.float(), scale)
        text = encoder_hidden_states.to(self.dtype).repeat(rounds, 1, 1)
        conditions = tree_map(lambda v: v.repeat(rounds, *[1] * (v.ndim - 1)), conditions)
        found: dict[int | str, torch.Tensor] = {"sample": sample}
        found |= self.outputs(sample.to(self.dtype), timestep.repeat(rounds), text, conditions)
        chosen = tuple(found[b].float() for b in self.blocks)
        if scaled:
            chosen = _Leave.apply(scale, *chosen)
        return chosen[0] if len(chosen) == 1 else chosen


class DownBlockEncoder(Encoder):
    """The downsampling half of a U-Net: `conv_in`, the embeddings, the down blocks, and for "mid" the mid block.

    Blocks: "last" (the last down block), "mid", or the index of a down block. Features are (N, C', H', W'). Other
    conditions: added_cond_kwargs, for SDXL.
    """

    @staticmethod
    def named(config: Mapping[str, Any]) -> tuple[int, dict[str, int | str]]:
        count = len(config["down_block_types"])
        return count, {"last": count - 1, "mid": "mid"}

    @staticmethod
    def cut(twin: Any, depth: int, taps: Sequence[int | str]) -> None:
        if "mid" not in taps:
            del twin.down_blocks[depth:]
            twin.mid_block = None
        twin.up_blocks = twin.conv_norm_out = twin.conv_out = None

    def outputs(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, conditions: dict[str, Any]
    ) -> dict[int | str, torch.Tensor]:
        unet, added = self.model, dict(conditions.get("added_cond_kwargs") or {})
        if "text_embeds" in added:
            added["text_embeds"] = added["text_embeds"].to(self.dtype)
        # The same calls, in the same order, as the first half of UNet2DConditionModel.forward.
        emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if extra is None else emb + extra
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)

        found: dict[int | str, torch.Tensor] = {}
        h = unet.conv_in(sample)
        for index, block in enumerate(unet.down_blocks):
            attends = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
            h, _ = block(hidden_states=h, temb=emb, **attends)
            found[index] = h
        if unet.mid_block is not None:
            attends = {"encoder_hidden_states": text} if getattr(unet.mid_block, "has_cross_attention", False) else {}
            found["mid"] = unet.mid_block(h, emb, **attends)
        return found


class TransformerEncoder(Encoder):
    """The first blocks of SD3's transformer: the embeddings and `transformer_blocks` up to the last tap.

    Blocks: indices from 0 to n - 1; "n/4", "n/2", "3n/4" are the last block of that share; "last" is "n/2". Features
    are the image tokens (N, tokens, width). Other conditions: pooled_projections (B, P).
    """

    @staticmethod
    def named(config: Mapping[str, Any]) -> tuple[int, dict[str, int | str]]:
        count = config["num_layers"]
        ends = {"last": count // 2, "n/4": count // 4, "n/2": count // 2, "3n/4": 3 * count // 4}
        return count, {name: max(0, end - 1) for name, end in ends.items()}

    @staticmethod
    def cut(twin: Any, depth: int, taps: Sequence[int | str]) -> None:
        del twin.transformer_blocks[depth:]
        twin.norm_out = twin.proj_out = None

    def outputs(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, conditions: dict[str, Any]
    ) -> dict[int | str, torch.Tensor]:
        model = self.model
        found: dict[int | str, torch.Tensor] = {}
        # The same calls, in the same order, as the first part of SD3Transformer2DModel.forward.
        h = model.pos_embed(sample).contiguous()
        temb = model.time_text_embed(timestep, conditions["pooled_projections"].to(self.dtype))
        text = model.context_embedder(text)
        for index, block in enumerate(model.transformer_blocks):
            if torch.is_grad_enabled() and model.gradient_checkpointing:
                text, h = model._gradient_checkpointing_func(block, h, text, temb, None)
            else:
                text, h = block(hidden_states=h, encoder_hidden_states=text, temb=temb)
            found[index] = h
        return found


class _Leave(torch.autograd.Function):
    """The identity on features (N, ...). Its backward scales each sample's gradient to a largest element near 1."""

    @staticmethod
    def forward(ctx: Any, scale: dict[str, torch.Tensor], *blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.scale = scale
        return tuple(block.view_as(block) for block in blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        largest = torch.stack([g.abs().flatten(1).amax(1) for g in gradients]).amax(0)
        # A power of two, so that scaling does not round. A sample with a zero gradient keeps its zeros.
        ctx.scale["s"] = torch.exp2(torch.log2(largest.clamp_min(2.0**-100)).floor())
        return None, *(g / ctx.scale["s"].view(-1, *[1] * (g.ndim - 1)) for g in gradients)


class _Enter(torch.autograd.Function):
    """The identity on the sample (N, C, H, W). Its backward undoes the scale that `_Leave` chose."""

    @staticmethod
    def forward(ctx: Any, sample: torch.Tensor, scale: dict[str, torch.Tensor]) -> torch.Tensor:
        ctx.scale = scale
        return sample.view_as(sample)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale["s"].view(-1, 1, 1, 1), None


def precision_of_f(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which f is computed, for a model with weights of dtype `weights` on `device`.

    float32 and float16 are kept. bfloat16 is too coarse for differences as small as those of eq. 13
    (docs/precision.md). It is replaced by float16 on a GPU and float32 on a CPU, which are as fast there.
    """
    if weights != torch.bfloat16:
        return weights
    return torch.float32 if device.type == "cpu" else torch.float16


@dataclass
class Displacement:
    """f(x) - f(target), float32, for x (B, C, H, W) at a small step d = x - target. Only x gets a gradient.

    secant "1" is eq. 13 as printed, and exact in float32. The DDPM steps with the predicted and with the true noise
    differ by 0.4% to 2% of the noise error, which is at or below the rounding of half precision. "auto" is for an f in
    half precision. It takes the difference over a longer step about the same midpoint, and the gradient at x itself:

        value      (f(m + s d / 2) - f(m - s d / 2)) / s,   m = target + d / 2,   s = length / rms(d) per sample
        gradient   of f at x

    near: a point and its displacement. "auto" then measures the difference from this point instead of the target. With
    the reference as `near`, the difference between policy and reference is measured directly: its relative error is a
    few percent even if it is very small, and it is exactly 0 if the two are equal.

    Even orders of f's curvature cancel in the value. Where d is already at least `length` (large timestep offsets, x0),
    s = 1, and the value is eq. 13. A number s above 1 is the one-sided secant (f(target + s d) - f(target)) / s, with
    the gradient at its far end. Several blocks give several differences.

    Every call of f has B rows. Stacked into one batch the rows would round differently, and equal x would not give
    equal results.
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
        # The value of target + s d, with the gradient of d: a gradient scaled by s would overflow in float16.
        ahead = self.target + s * (x - self.target).detach() + (x - x.detach()) if s != 1 else x
        return _each(lambda p, q: _value_and_gradient((p.detach() - q) / s, p), self.f(ahead), self._f_target)


def _central(f: Callable[[torch.Tensor], Features], x: torch.Tensor, base: torch.Tensor, length: float) -> Features:
    """f(x) - f(base), from two points on the line through x and base, at least `length` apart, about their midpoint."""
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
