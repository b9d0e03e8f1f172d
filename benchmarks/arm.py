"""One arm of benchmarks/step.py: a model, an optimizer, and a timed training step on random data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import train_ncp_dpo
from ncp.common.config import parse
from ncp.ddpm import add_noise, previous, reverse_step, to_x0
from ncp.encoder import DownBlockEncoder
from ncp.losses import dpo_loss, mean_square
from ncp.training.engine import make_accelerator, make_optimizer
from ncp.training.inputs import conditions, latents
from ncp.training.memory import Peak
from ncp.training.meter import peak_memory_gib
from ncp.training.models import assemble, load_pipe
from ncp.training.pipeline import DTYPES, describe

ROOT = Path(__file__).parents[1]
KINDS = ("cached", "pixels", "straightforward")


class Arm:
    """A model, an optimizer, and `step()`, which returns seconds by phase of one training step on new random data."""

    def __init__(self, name: str, model: str, argv: list[str]):
        kind, _, changes = name.partition(":")
        options = [c for c in changes.split(",") if "=" in c]
        self.kind = "pixels" if "pixels" in changes.split(",") else kind if kind in KINDS else "cached"
        self.name = kind
        argv = [*argv, *(a for option in options for a in (f"--{option.partition('=')[0]}", option.partition("=")[2]))]
        config = parse(train_ncp_dpo.Config, argv)
        self.config = config = replace(config, cached_latents="-" if self.kind == "cached" else None, report_to="none")
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        set_seed(0)
        dtype = DTYPES[config.mixed_precision]
        if model == "tiny":
            config.pretrained_model_name_or_path = str(ROOT / "tiny/model")
            description = describe(config)
            where = {"dtype": dtype, "subfolder": "unet"}
            unet = UNet2DConditionModel.from_pretrained(ROOT / "tiny/model", **where).to(self.device)
            scheduler = DDPMScheduler.from_pretrained(ROOT / "tiny/model", subfolder="scheduler")
            pipe = None if self.kind == "cached" else load_pipe(config, description, self.accelerator)
        else:
            description = architectures.description(model)
            unet, scheduler = architectures.unet(model, dtype, self.device), architectures.scheduler(model)
            upcast = torch.float32 if model == "sdxl" else dtype
            pipe = None if self.kind == "cached" else architectures.pipe(model, dtype, upcast, self.device)
        if self.kind == "straightforward":
            assert pipe is not None
            pipe.vae.float()
            self.copy = copy.deepcopy(unet)  # with its own storage
            self.copy_encoder = DownBlockEncoder.from_model(self.copy)
            if config.gradient_checkpointing:
                self.copy_encoder.enable_gradient_checkpointing()
        self.m = assemble(config, description, unet, scheduler, pipe, self.accelerator)
        self.optimizer = make_optimizer(config, self.m.lora_parameters)
        self.unet, self.optimizer = self.accelerator.prepare(self.m.unet, self.optimizer)
        self.times: dict[str, float] = {}
        self._watch(self.unet, "policy")
        self._watch(self.m.reference, "reference")
        self._watch(self.m.encoder if self.kind != "straightforward" else self.copy_encoder, "encoder")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _watch(self, module: Any, phase: str) -> None:
        """Adds the time of the module's forward passes to the phase. It synchronises the device, which slows steps
        down, so it is used only for steps timed by phase."""

        def before(*_: Any) -> None:
            if self.by_phase:
                self.mark = self._now()

        def after(*_: Any) -> None:
            if self.by_phase and not self.backward:
                self.times[phase] = self.times.get(phase, 0) + self._now() - self.mark

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    @contextmanager
    def _phase(self, phase: str) -> Any:
        start = self._now() if self.by_phase else 0.0
        yield
        if self.by_phase:
            self.times[phase] = self.times.get(phase, 0) + self._now() - start

    def batch(self) -> dict[str, Any]:
        """A random batch in the loader's format, on the device."""
        description, size = self.m.description, self.config.train_batch_size
        shape = description.latent_shape(self.config.resolution)
        draw = partial(torch.randn, device=self.device)
        among = description.timesteps(self.config.k).among
        batch: dict[str, Any] = {
            "eps": draw(size, *shape),
            "z": draw(2 * size, *shape),
            "posterior": draw(2 * size, *shape),
            "timestep": torch.randint(among.start, among.stop, (size,), device=self.device),
            "time_ids": torch.tensor([[*2 * [self.config.resolution], 0, 0, *2 * [self.config.resolution]]] * 2 * size),
        }
        batch["time_ids"] = batch["time_ids"].to(self.device)
        if self.kind == "cached":
            mean, log_variance = draw(2 * size, *shape), draw(2 * size, *shape) - 8
            batch["moments"] = torch.cat([mean, log_variance], 1).half()
            batch["text"] = draw(size, *description.text_shape).half()
            if description.pooled_dim:
                batch["pooled"] = draw(size, description.pooled_dim).half()
        else:
            side = self.config.resolution
            batch["pixels"] = torch.randint(0, 256, (2 * size, 3, side, side), dtype=torch.uint8, device=self.device)
            batch["prompt"] = [f"a red circle on blue, number {i}" for i in range(size)]
        return batch

    def step(self, by_phase: bool = False) -> dict[str, float]:
        self.by_phase, self.backward, self.times = by_phase, False, {}
        batch = self.batch()
        start = self._now()
        loss = self.straightforward if self.kind == "straightforward" else train_ncp_dpo.ncp_dpo
        losses, _ = loss(self.m, self.unet, batch, self.config)
        self.backward = True
        with self._phase("backward"):
            self.accelerator.backward(losses.mean())
        with self._phase("optimizer"):
            self.accelerator.clip_grad_norm_(self.m.lora_parameters, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        total = self._now() - start
        if by_phase:
            self.times["conditions"] = total - sum(self.times.values())  # VAE, text encoders, and the code between
        return {"step": total, **self.times}

    def straightforward(self, m: Any, unet: Any, batch: dict[str, Any], config: Any) -> Any:
        """Algorithm 1, written as directly as possible."""
        x0, c = latents(m, batch), conditions(m, batch)
        t, eps, z = batch["timestep"].repeat(2), batch["eps"].repeat(2, 1, 1, 1), batch["z"]
        x_t = add_noise(m.scheduler, x0, eps, t)
        x0_theta = to_x0(m.scheduler, unet(x_t, t, **c).sample, t, x_t)
        m.unet.disable_adapters()
        with torch.no_grad(), self._phase("reference"):
            counted = self.times.get("policy", 0)
            x0_ref = to_x0(m.scheduler, unet(x_t, t, **c).sample, t, x_t)
            if self.by_phase:
                self.times["policy"] = counted
        m.unet.enable_adapters()
        t_prev = previous(t, 1)
        f = partial(self.copy_encoder, timestep=t_prev, **c)
        with torch.no_grad():
            target = f(reverse_step(m.scheduler, x0, t, t_prev, x_t, z)).float()
        theta = f(reverse_step(m.scheduler, x0_theta, t, t_prev, x_t, z)).float()
        with torch.no_grad():
            ref = f(reverse_step(m.scheduler, x0_ref, t, t_prev, x_t, z)).float()
        loss_theta, loss_ref = mean_square(theta - target), mean_square(ref - target)
        (theta_w, theta_l), (ref_w, ref_l) = loss_theta.chunk(2), loss_ref.chunk(2)
        return dpo_loss(theta_w, theta_l, ref_w, ref_l, config.beta)

    def flops(self) -> float:
        """Floating-point operations of a step."""
        return operations(self.step)

    def peak_memory_gib(self) -> float:
        return peak_memory_gib(self.device)

    def tensors_gib(self) -> float:
        """GiB of all parameters and optimizer state (each storage once), plus the peak of a step's other tensors."""
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
        with Peak() as peak:
            self.step()
        return (self.weights_bytes() + sum(v.nbytes for v in state) + peak.bytes) / 2**30

    def weights_bytes(self) -> int:
        """Bytes of the parameters of all models, each storage once."""
        modules = [self.m.unet, self.m.reference, self.m.encoder, getattr(self, "copy", None)]
        if self.m.pipe is not None:
            modules += [part for part in self.m.pipe.components.values() if isinstance(part, torch.nn.Module)]
        storages = {
            s.data_ptr(): s for module in modules if module for p in module.parameters() if (s := p.untyped_storage())
        }
        return sum(s.nbytes() for s in storages.values())

    def matmul_ceiling(self) -> float:
        """Floating-point operations per second of a large matrix product, in the step's precision."""
        n, count = (8192, 20) if self.device.type == "cuda" else (2048, 4)
        a = torch.randn(n, n, device=self.device).to(self.m.dtype)
        a @ a
        start = self._now()
        for _ in range(count):
            a @ a
        return 2 * n**3 * count / (self._now() - start)


ATTENTION_ON_CPU = {  # PyTorch's counter leaves out the CPU's fused kernel
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in `work()`, by PyTorch's count."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        work()
    return counter.get_total_flops()


class PeakSaved:
    """The most bytes at one time that autograd keeps for the backward pass inside the block, parameters aside.

    now: bytes kept at present; a storage that several operations keep counts once.
    """

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.bytes = 0

    def __enter__(self) -> PeakSaved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(partial(_Kept, self), lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)


class _Kept:
    """A tensor in autograd's keeping; it goes with its node of the graph."""

    def __init__(self, peak: PeakSaved, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        # Detached: an output that kept its node, which keeps the output, would stay for ever.
        self.peak, self.tensor = peak, tensor.detach()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        if isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
            self.size = 0
        held = peak.holders.get(self.key, 0)
        peak.holders[self.key] = held + 1
        if not held:
            peak.now += self.size
            peak.bytes = max(peak.bytes, peak.now)

    def __del__(self) -> None:
        self.peak.holders[self.key] -= 1
        if not self.peak.holders[self.key]:
            self.peak.now -= self.size
