"""Times one training step, beside the straightforward arrangement, in one run.

    python benchmarks/step.py --model tiny --config configs/tiny_ncp_dpo.yaml
    python benchmarks/step.py --model sdxl --config configs/sdxl_ncp_dpo.yaml --arms cached,compiled:torch_compile=true
        --train_batch_size 4 --json step.json

--model sd15 and sdxl are the full architectures with random weights, built on the device; tiny is the embedded
pipeline. Data are random too: what is measured is the step. An arm is one of

    cached            this project, from cached latents and embeddings
    pixels            this project, images and prompts encoded in the step
    straightforward   what such scripts do today, written here for comparison: a full deep copy of the U-Net as the
                      encoder, the reference by switching the policy's adapters off, a float32 VAE and the text encoders
                      inside the step, target, policy and reference embedded one after another, eq. 13 as printed
    NAME:key=value,…  `cached` with these config keys changed (NAME:pixels,key=value,… for `pixels`)

Each arm runs in a process of its own, so that its peak memory is its own; the steps of all arms are taken in turn, or
(`--one_by_one`) arm after arm. An arm that runs out of memory is left out. Ratios are of the time per pair, to the
last arm.
GiB is the GPU allocator's peak, or the process's on a CPU, libraries included; "tensors" counts tensors alone.
Figures are medians. TFLOP/s are PyTorch's count for a pair of the first arm over each arm's time for a pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ncp.common.processes import tied
from ncp.training.engine import make_accelerator, make_optimizer
from ncp.training.memory import Peak
from ncp.training.meter import peak_memory_gib
from ncp.training.models import assemble, load_pipe
from ncp.training.pipeline import DTYPES, describe

PHASES = ("conditions", "policy", "reference", "encoder", "backward", "optimizer")


# ---------------------------------------------------------------- one arm, in a process of its own


class Arm:
    """A model, an optimizer, and `step()`: seconds by phase of one training step on fresh random data."""

    def __init__(self, name: str, model: str, argv: list[str]):
        import architectures
        import torch
        from accelerate.utils import set_seed
        from diffusers import DDPMScheduler, UNet2DConditionModel

        import train_ncp_dpo
        from ncp import models
        from ncp.common.config import parse

        kind, _, changes = name.partition(":")
        options = [c for c in changes.split(",") if "=" in c]
        self.kind = "pixels" if "pixels" in changes.split(",") else kind if kind in KINDS else "cached"
        argv = [*argv, *(a for option in options for a in (f"--{option.partition('=')[0]}", option.partition("=")[2]))]
        config = parse(train_ncp_dpo.Config, argv)
        self.config = config = replace(config, cached_latents="-" if self.kind == "cached" else None, report_to="none")
        self.accelerator = make_accelerator(config)
        self.device, self.torch, self.models, self.train = self.accelerator.device, torch, models, train_ncp_dpo
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
            unet, scheduler = architectures.unet(model, dtype, self.device), architectures.scheduler()
            upcast = torch.float32 if model == "sdxl" else dtype
            pipe = None if self.kind == "cached" else architectures.pipe(model, dtype, upcast, self.device)
        if self.kind == "straightforward":
            pipe.vae.float()
            self.copy = copy.deepcopy(unet)  # with storage of its own
            if config.gradient_checkpointing:
                self.copy.enable_gradient_checkpointing()
            self.copy_encoder = models.DownBlockEncoder(self.copy, [len(self.copy.down_blocks) - 1])
        self.m = assemble(config, description, unet, scheduler, pipe, self.accelerator)
        self.optimizer = make_optimizer(config, self.m.lora_parameters)
        self.unet, self.optimizer = self.accelerator.prepare(self.m.unet, self.optimizer)
        self.times: dict[str, float] = {}
        self._watch(self.unet, "policy")
        self._watch(self.m.reference, "reference")
        self._watch(self.m.encoder if self.kind != "straightforward" else self.copy_encoder, "encoder")

    def _now(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def _watch(self, module: Any, phase: str) -> None:
        """Adds the module's forward passes to the phase. Waits for the device: only for the steps by phase."""

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
        """Random data as the loader gives them, on the device."""
        torch, description, size = self.torch, self.m.description, self.config.train_batch_size
        shape = description.latent_shape(self.config.resolution)
        draw = partial(torch.randn, device=self.device)
        low, high = self.config.first_timestep, description.num_timesteps
        batch = {
            "eps": draw(size, *shape),
            "z": draw(2 * size, *shape),
            "posterior": draw(2 * size, *shape),
            "timestep": torch.randint(low, high, (size,), device=self.device),
            "time_ids": torch.tensor([[*2 * [self.config.resolution], 0, 0, *2 * [self.config.resolution]]] * 2 * size),
        }
        batch["time_ids"] = batch["time_ids"].to(self.device)
        if self.kind == "cached":
            channels, *side = shape
            batch["moments"] = torch.cat(
                [draw(2 * size, channels, *side), draw(2 * size, channels, *side) - 8], 1
            ).half()
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
        loss = self.straightforward if self.kind == "straightforward" else self.train.ncp_dpo
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
            self.times["conditions"] = total - sum(self.times.values())  # VAE, text encoders, and what lies between
        return {"step": total, **self.times}

    def straightforward(self, m: Any, unet: Any, batch: dict[str, Any], config: Any) -> Any:
        """Algorithm 1, as directly as it can be written down."""
        from ncp.ddpm import add_noise, previous, reverse_step, to_epsilon
        from ncp.losses import dpo_loss, mean_square

        torch = self.torch
        x0, c = self.models.latents(m, batch), self.models.conditions(m, batch)
        t, eps, z = batch["timestep"].repeat(2), batch["eps"].repeat(2, 1, 1, 1), batch["z"]
        x_t = add_noise(m.scheduler, x0, eps, t)
        eps_theta = to_epsilon(m.scheduler, unet(x_t, t, **c).sample, t, x_t)
        m.unet.disable_adapters()
        with torch.no_grad(), self._phase("reference"):
            counted = self.times.get("policy", 0)
            eps_ref = to_epsilon(m.scheduler, unet(x_t, t, **c).sample, t, x_t)
            if self.by_phase:
                self.times["policy"] = counted
        m.unet.enable_adapters()
        t_prev = previous(t, 1)
        f = partial(self.copy_encoder, timestep=t_prev, **c)
        with torch.no_grad():
            target = f(reverse_step(m.scheduler, eps, t, t_prev, x_t, z)).float()
        theta = f(reverse_step(m.scheduler, eps_theta, t, t_prev, x_t, z)).float()
        with torch.no_grad():
            ref = f(reverse_step(m.scheduler, eps_ref, t, t_prev, x_t, z)).float()
        loss_theta, loss_ref = mean_square(theta - target), mean_square(ref - target)
        return dpo_loss(*loss_theta.chunk(2), *loss_ref.chunk(2), beta=config.beta)

    def flops(self) -> float:
        """Floating-point operations of a step."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def peak_memory_gib(self) -> float:

        return peak_memory_gib(self.device)

    def tensors_gib(self) -> float:
        """All parameters and optimizer state, each storage once, and the most that a step has beside them."""

        modules = [self.m.unet, self.m.reference, self.m.encoder, getattr(self, "copy", None)]
        if self.m.pipe is not None:
            modules += [part for part in self.m.pipe.components.values() if isinstance(part, self.torch.nn.Module)]
        storages = {
            s.data_ptr(): s for module in modules if module for p in module.parameters() if (s := p.untyped_storage())
        }
        state = [v for entry in self.optimizer.state.values() for v in entry.values() if self.torch.is_tensor(v)]
        with Peak() as peak:
            self.step()
        return (sum(s.nbytes() for s in storages.values()) + sum(v.nbytes for v in state) + peak.bytes) / 2**30

    def matmul_ceiling(self) -> float:
        """Floating-point operations per second of a large matrix product in the step's precision."""
        torch = self.torch
        n, count = (8192, 20) if self.device.type == "cuda" else (2048, 4)
        a = torch.randn(n, n, device=self.device).to(self.m.dtype)
        a @ a
        start = self._now()
        for _ in range(count):
            a @ a
        return 2 * n**3 * count / (self._now() - start)


KINDS = ("cached", "pixels", "straightforward")


def work(name: str, model: str, argv: list[str]) -> None:
    """Answers commands on standard input with one line of JSON each."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    arm = Arm(name, model, argv)
    answers = {
        "step": lambda: arm.step(),
        "phases": lambda: arm.step(by_phase=True),
        "memory": lambda: arm.peak_memory_gib(),
        "tensors": lambda: arm.tensors_gib(),
        "flops": lambda: arm.flops(),
        "ceiling": lambda: arm.matmul_ceiling(),
        "device": lambda: str(arm.device),
        "batch": lambda: arm.config.train_batch_size,
    }
    print(json.dumps(time.perf_counter() - start), file=replies)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), file=replies)


# ---------------------------------------------------------------- all arms


class Worker:
    """An arm in a process of its own; `ask` gives None once that has ended, out of memory for example."""

    def __init__(self, name: str, model: str, argv: list[str]):
        # Tied: a step that is under way would not notice that its commands have ended.
        command = tied([sys.executable, __file__, "--worker", name, "--model", model, *argv])
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.built_s = self.read()

    def read(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, question: str) -> Any:
        try:
            print(question, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.read()

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, Any]]:
    """Raw figures by arm, of arms that are all there at once and take their steps in turn; without those that ended."""
    workers = [Worker(name, args.model, argv) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(2 + args.steps):  # two to warm up
        for worker in workers:
            step = worker.ask("step")
            times[worker.name] += [step["step"]] if step and k >= 2 else []
    memory = {worker.name: worker.ask("memory") for worker in workers}  # before anything but training steps has run
    figures = {}
    for worker in workers:
        phases = [worker.ask("phases") for _ in range(min(3, args.steps))]
        raw = {question: worker.ask(question) for question in ("batch", "device", "flops", "ceiling", "tensors")}
        if all(phases) and all(raw.values()):
            raw["phases"] = {p: statistics.median(run.get(p, 0) for run in phases) for p in PHASES}
            raw |= {"built_s": worker.built_s, "memory": memory[worker.name], "times": times[worker.name]}
            figures[worker.name] = raw
        else:
            print(f"arm {worker.name} ended; what it said stands above", flush=True)
        worker.end()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--arms", default="cached,pixels,straightforward", help="separated by spaces or ;")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each arm, after two to warm up")
    parser.add_argument("--one_by_one", action="store_true", help="arm after arm, where memory does not hold them all")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args, argv = parser.parse_known_args()
    if not any(a.startswith("--config") for a in argv):
        argv = ["--config", str(ROOT / f"configs/{args.model}_ncp_dpo.yaml"), *argv]
    if args.worker:
        work(args.worker, args.model, argv)
        return

    names = args.arms.replace(";", " ").split() if ":" in args.arms else args.arms.replace(",", " ").split()
    raw: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in names] if args.one_by_one else [names]:
        raw |= measure(group, args, argv)
    if not raw:
        sys.exit("error: no arm ran")
    first, last = next(iter(raw.values())), list(raw.values())[-1]
    flops, ceiling = first["flops"] / first["batch"], first["ceiling"]
    figures: dict[str, Any] = {"model": args.model, "arguments": argv, "device": first["device"], "arms": {}}
    figures |= {"flops_per_pair": flops, "matmul_flops_per_s": ceiling}
    print(f"{args.model}, {first['device']}: {flops / 1e12:.4f} TFLOP per pair, matmul {ceiling / 1e12:.2f} TFLOP/s")
    columns = {"pairs": 6, "step s": 8, "pairs/s": 9, "TFLOP/s": 9, "share": 7, "GiB": 7, "tensors": 8, "ratio": 7}
    print(
        f"{'arm':<24}" + "".join(f"{c:>{w}}" for c, w in columns.items()) + "  " + " ".join(f"{p:>10}" for p in PHASES)
    )
    for name, arm in raw.items():
        batch, seconds = arm["batch"], statistics.median(arm["times"])
        pairs = zip(arm["times"], last["times"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs) * last["batch"] / batch  # of the time per pair
        rate = flops * batch / seconds
        figures["arms"][name] = {
            "pairs": batch, "build_s": arm["built_s"], "step_s": seconds, "steps_s": arm["times"],
            "pairs_per_s": batch / seconds, "flops_per_s": rate, "share_of_matmul": rate / ceiling,
            "peak_memory_gib": arm["memory"], "tensors_gib": arm["tensors"], "ratio_to_last": ratio,
            "phases_s": arm["phases"],
        }  # fmt: skip
        print(
            f"{name.partition(':')[0][:23]:<24}{batch:>6}{seconds:>8.3f}{batch / seconds:>9.2f}{rate / 1e12:>9.2f}"
            f"{rate / ceiling:>7.0%}{arm['memory']:>7.2f}{arm['tensors']:>8.2f}{ratio:>7.2f}  "
            + " ".join(f"{arm['phases'][p]:>10.4f}" for p in PHASES)
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from ncp.common.errors import run_program

    run_program(main)
