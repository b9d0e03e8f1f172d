"""Estimates the memory of a run from the model's config files alone: no weights are loaded, nothing is computed.

The estimate is the sum of three parts. Weights, LoRA, gradients and optimizer state are counted. For the activations,
the forward passes of policy and encoder run on PyTorch's meta device, which has shapes but no data, and the tensors
that autograd saves are added up. The third part is the peak beside them: a recomputed block, or an embedding pass
without a gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ncp.encoder import precision_of_f
from ncp.training.inputs import images_per_pass
from ncp.training.pipeline import DTYPES, Description
from ncp.training.settings import TrainingConfig

CONTEXT = 600 << 20  # bytes of CUDA itself: its context and the libraries' workspaces
FRAGMENTS = 0.05  # share of the rest that the allocator loses to fragmentation


@dataclass
class Estimate:
    """Bytes on one device, by purpose."""

    weights: int  # the frozen model, shared by policy, reference and encoder (with bf16 also f's copy of its part)
    inputs: int  # VAE and text encoders; 0 with a cache
    lora: int  # LoRA weights, gradients, optimizer state, average, a following reference's LoRA
    activations: int  # kept for the backward pass
    working: int  # peak of temporary tensors beside the others

    @property
    def total(self) -> int:
        used = self.weights + self.inputs + self.lora + self.activations + self.working
        return CONTEXT + round(used * (1 + FRAGMENTS))

    def __str__(self) -> str:
        parts = {k: v for k, v in vars(self).items() if v}
        text = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
        return f"{self.total / 2**30:.1f} GiB on a GPU ({text}, the rest CUDA's own and fragments)"


def print_estimate(
    config: TrainingConfig, description: Description, accelerator: Accelerator, images_per_sample: int
) -> None:
    """Prints how much memory a process will need, and a warning if its GPU has less. Needs no loaded model."""
    if not accelerator.is_main_process:
        return
    need = estimate(config, description, images_per_sample)
    device = accelerator.device
    have = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    accelerator.print(f"{'memory':>16}: about {need}" + (f"; it has {have / 2**30:.1f} GiB" if have else ""))
    if have and need.total > have:
        advice = [] if config.gradient_checkpointing else ["gradient_checkpointing: true"]
        advice += ["cached_latents"] if config.cached_latents is None else []
        if config.train_batch_size > 1:
            advice.append("a smaller train_batch_size with more gradient_accumulation_steps")
        accelerator.print(f"{'':>16}  likely to run out of memory; try {', or '.join(advice) or 'a larger GPU'}")


def estimate(config: TrainingConfig, description: Description, images_per_sample: int, cuda: bool = True) -> Estimate:
    """The estimate for one process. images_per_sample: 2 for pairs, 1 for winners alone. cuda: whether norms run in
    float32, as under CUDA's autocast."""
    dtype = DTYPES[config.mixed_precision]
    rows = config.train_batch_size * images_per_sample
    family = description.family
    with torch.device("meta"):
        unet = family.MODEL.from_config(description.denoiser).to(dtype).requires_grad_(False)
        weights = size_of([*unet.parameters(), *unet.buffers()])
        of_f = precision_of_f(dtype, torch.device("cuda" if cuda else "cpu"))
        encoder = family.ENCODER.from_model(unet, config.encoder_blocks, of_f)
        weights += size_of([*encoder.parameters(), *encoder.buffers()]) if of_f != dtype else 0
        unet.add_adapter(LoraConfig(r=config.rank, init_lora_weights=False, target_modules=family.LORA_TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    for p in trained:
        p.data = p.data.to(dtype)  # as autocast casts it in the forward pass
    if config.gradient_checkpointing:
        family.checkpoint_blocks(unet, config.checkpointed_blocks)
        if {"all", "encoder"} & set(config.checkpointed_blocks):
            encoder.enable_gradient_checkpointing()

    x, c = inputs(config, description, rows, dtype)
    frozen = [t.untyped_storage() for m in (unet, encoder) for t in (*m.parameters(), *m.buffers())]
    kept = {id(storage) for storage in frozen}  # valid while `frozen` keeps them alive
    with fused_attention(), Saved(kept) as saved:
        with norms_in_float32(cuda and config.mixed_precision != "no"):
            eps = unet(x, **c).sample
        if config.space == "perceptual":
            encoder(eps, **c)
    activations = saved.bytes
    working = 0
    with torch.no_grad(), fused_attention():
        with Peak() as peak:
            unet(x, **c)
        working = peak.bytes
        if config.space == "perceptual":
            with Peak() as peak:
                encoder(x, **c)
            working = max(working, peak.bytes)
    if config.gradient_checkpointing:
        working = max(working, largest_block(unet, encoder, config, x, c, kept))
    state = 4 + 4 + (2 if config.use_8bit_adam else 8) + (4 if config.use_ema else 0)
    state += 4 if getattr(config, "reference_decay", None) is not None else 0
    loaded = 0
    if not config.cached_latents:
        loaded = encoders(config, description)
    elif config.validation_prompts:  # they are loaded for the pictures, when no activations are kept
        working = max(working, encoders(config, description) - activations)
    return Estimate(weights, loaded, count * state, activations, working)


def inputs(
    config: TrainingConfig, description: Description, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(x_t, timestep and conditions) of a step, on the meta device."""
    draw = torch.empty
    with torch.device("meta"):
        x = draw(rows, *description.latent_shape(config.resolution), dtype=dtype)
        text, time_ids = draw(rows, *description.text_shape, dtype=dtype), draw(rows, 6)
        pooled = draw(rows, description.pooled_dim, dtype=dtype) if description.pooled_dim else None
        t = draw(rows, dtype=torch.long)
    return x, {"timestep": t, **description.family.conditions(description, text, pooled, time_ids)}


def largest_block(unet: Any, encoder: Any, config: TrainingConfig, x: Any, c: dict[str, Any], kept: set) -> int:
    """Bytes that autograd saves when the largest checkpointed block is recomputed."""
    largest = 0

    def measure(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal largest
        with torch.enable_grad(), Saved(kept) as saved:
            out = function(*[a.detach().requires_grad_() if _is_float(a) else a for a in args], **kwargs)
        largest = max(largest, saved.bytes)
        return tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, out)

    for model in (unet, encoder):
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = measure
    with fused_attention():
        unet(x, **c)
        if config.space == "perceptual":
            encoder(x.detach().requires_grad_(), **c)
    return largest


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def encoders(config: TrainingConfig, description: Description) -> int:
    """Bytes of VAE and text encoders, and of the peak of one VAE pass."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    dtype = DTYPES[config.mixed_precision]
    vae_dtype = description.vae_dtype(dtype)
    images = min(2 * config.train_batch_size, images_per_pass(description.vae, config.resolution))
    with torch.device("meta"), torch.no_grad(), fused_attention():
        vae = AutoencoderKL.from_config(description.vae).to(vae_dtype)
        total = size_of(vae.parameters())
        for text in description.text_encoders:
            t5 = text.get("model_type") == "t5"
            model = T5EncoderModel(T5Config(**text)) if t5 else CLIPTextModel(CLIPTextConfig(**text))
            total += size_of(model.to(dtype).parameters())
            if dtype == torch.float16:  # transformers keeps these of T5 in float32
                kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
                total += 2 * sum(p.numel() for n, p in model.named_parameters() if kept & set(n.split(".")))
        with Peak() as peak:
            vae.encode(torch.empty(images, 3, *2 * [config.resolution], dtype=vae_dtype))
    return total + peak.bytes


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Saved:
    """Adds up the bytes that autograd saves for the backward pass inside the block, except storages in `kept`."""

    def __init__(self, kept: set[int]):
        self.seen: dict[int, Any] = {}
        self.bytes = 0
        self.kept = kept

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen and id(storage) not in self.kept and not isinstance(tensor, torch.nn.Parameter):
            self.seen[id(storage)] = storage  # kept alive, so that no other storage gets its id
            self.bytes += storage.nbytes()
        return tensor

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)


class Peak(TorchDispatchMode):
    """The peak, in bytes, of the tensors created inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.now = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {s._cdata for s in _storages((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.live:  # otherwise a view, for example of a weight
                self.live[key] = weakref.finalize(storage, self._gone, key, size)
                self.now += size
                self.bytes = max(self.bytes, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.live.pop(key, None)
        self.now -= size


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Attention(torch.autograd.Function):
    """What autograd saves for a fused attention kernel: q, k, v, the output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


@contextmanager
def norms_in_float32(enabled: bool) -> Iterator[None]:
    """Group and layer norms inside the block compute and save float32, as under CUDA's autocast (not the CPU's)."""
    norms: Any = F
    group, layer = F.group_norm, F.layer_norm

    def wide(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else weight.float()

    if enabled:
        norms.group_norm = lambda x, n, w, b, eps: group(x.float(), n, w.float(), b.float(), eps).to(x.dtype)
        norms.layer_norm = lambda x, shape, w, b, eps: layer(x.float(), shape, wide(w), wide(b), eps).to(x.dtype)
    try:
        yield
    finally:
        norms.group_norm, norms.layer_norm = group, layer


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention inside the block saves no matrix of scores, as on a GPU. The meta device's own version would."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real
