"""Whether the host ever waits for the GPU: the scripts' own loops on a GPU that there is not.

    PYTHONPATH=. python tests/fake_gpu.py    # JSON: for each case the waits in the micro-batches and beside them

Tensors of PyTorch's FakeTensorMode have shapes, dtypes and a device, but no data. So an operation that needs data on
the host cannot pass unseen, and one that mixes devices raises. The device is PyTorch's "privateuse1", which is free
for backends in Python: a build without CUDA has it, backward pass included. `torch` is changed for good by it, hence
a process of its own. Run are the scripts' `main`, accelerate, peft and diffusers. Casts stand for autocast, which has
no rules for this device; torch's AdamW stands for the 8-bit one, whose kernels take pointers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from halves import float16_on_cpu
from pipelines import save_dataset, save_pipeline
from runs import SCRIPTS, arguments, as_a_process
from support import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import ncp.training.run
from ncp.training.run import Run

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu:0")
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.is_nonzero}
# The size of the result is data.
SIZES = {
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.repeat_interleave,
}
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


@dataclass
class Waits(TorchDispatchMode):
    """Notes the operations inside the block for which the host waits, with the line of code they come from.

    These are: reading a value of the GPU's, asking for a size that is data, and copying between host and GPU, except to
    the GPU with `non_blocking` (the loader's batches, in pinned memory).
    """

    where: str = "step"
    found: dict[str, list[str]] = field(default_factory=lambda: {"micro": [], "step": []})
    operations: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, kind: str) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if "torch/_" not in f.filename and f.filename != __file__]
        path = Path(frames[-1].filename)
        name = path.relative_to(ROOT) if ROOT in path.parents and "site-packages" not in path.parts else path.name
        self.found[self.where].append(f"{kind} in {name}, {frames[-1].name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(t.device.type == GPU.type for t in given)
        self.operations += there
        if packet in READS:
            if there:
                self.note("read")
            return True if packet is torch.ops.aten.equal else 1  # of a fake tensor: any number will do
        if packet in SIZES and there:
            self.note("size")
        if packet in COPIES:
            source = args[1] if packet is torch.ops.aten.copy_ else args[0]
            target = args[0].device if packet is torch.ops.aten.copy_ else kwargs.get("device") or source.device
            non_blocking = kwargs.get("non_blocking") or (packet is torch.ops.aten.copy_ and len(args) > 2 and args[2])
            if target.type != source.device.type and not (non_blocking and target.type == GPU.type):
                self.note("copy to the GPU" if target.type == GPU.type else "read")
            if packet is torch.ops.aten._to_copy and target.type == GPU.type != source.device.type:
                # A constant would be copied in earnest.
                return torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)
        return func(*args, **kwargs)

    def zeros(self, tensor: torch.Tensor) -> Any:
        """In place of `tolist` on a fake tensor, which would read element by element."""
        if tensor.device.type == GPU.type:
            self.note("read")
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape).tolist()


def on_the_gpu(run: Run) -> None:
    """Moves everything that a run holds to the fake GPU; what is shared stays shared."""
    moved: dict[int, Any] = {}
    m = run.models

    def move(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in moved:
            there = torch.empty_like(value, device=GPU)
            moved[id(value)] = torch.nn.Parameter(there, value.requires_grad) if value.is_leaf else there
        return moved[id(value)]

    pipe = [p for p in m.pipe.components.values() if isinstance(p, torch.nn.Module)] if m.pipe else []
    for module in {id(s): s for part in (m.unet, m.reference, m.encoder, *pipe) for s in part.modules()}.values():
        for table in (module._parameters, module._buffers):
            table.update({k: move(v) for k, v in table.items() if v is not None})
    m.scheduler.alphas_cumprod = torch.empty_like(m.scheduler.alphas_cumprod, device=GPU)
    for group in run.optimizer.param_groups:
        group["params"] = [moved[id(p)] for p in group["params"]]
    if run.average:
        run.average.shadow_params = [torch.empty_like(p, device=GPU) for p in run.average.shadow_params]
    for unet in (m.unet, m.reference):  # in place of autocast
        unet.register_forward_pre_hook(lambda u, args: (args[0].to(u.dtype), *args[1:]))
    run.accelerator.state.device = GPU
    run.accelerator.scaler = run.optimizer.scaler = torch.amp.GradScaler(GPU.type)


def from_a_cache(batches: Iterator[dict[str, Any]], text: tuple[int, int], pooled: int | None) -> Iterator[Any]:
    """The loader's batches with moments and embeddings, as a cache gives them, instead of pixels and prompts."""
    for batch in batches:
        size = len(batch.pop("prompt"))
        del batch["pixels"]
        batch |= {"moments": torch.zeros(2 * size, 8, *batch["eps"].shape[2:]).half()[: len(batch["z"])]}
        batch |= {"text": torch.zeros(size, *text).half()}
        batch |= {"pooled": torch.zeros(size, pooled).half()} if pooled else {}
        yield batch


def waits(kind: str, argv: list[str], cached: bool, spoil: Callable[[torch.Tensor], Any] | None = None) -> dict:
    """What the host waits for in a run. spoil: done to the losses of each micro-batch."""
    script, counter = SCRIPTS[kind], Waits()
    objective, start = getattr(script, f"ncp_{kind}"), script.start

    def spoiled(*args: Any) -> Any:
        losses, metrics = objective(*args)
        spoil(losses)
        return losses, metrics

    with pytest.MonkeyPatch.context() as patch, as_a_process(), ExitStack() as modes:

        def start_on_the_gpu(*args: Any, **options: Any) -> Run:
            run = start(*args, **options)
            if cached:
                description, run.models.pipe = run.models.description, None
                run.batches = from_a_cache(run.batches, description.text_shape, description.pooled_dim)
            micro_batches = run.micro_batches

            def watched() -> Iterator[dict[str, Any]]:
                counter.where = "micro"
                yield from micro_batches()
                counter.where = "step"

            patch.setattr(run, "micro_batches", watched)
            patch.setattr(run, "save_checkpoint", lambda _: None)
            patch.setattr(run, "finish", run.guard.close)
            modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            on_the_gpu(run)
            modes.enter_context(counter)
            return run

        float16_on_cpu(patch)
        patch.setattr(ncp.training.run, "print_estimate", lambda *_: None)
        patch.setattr(FakeTensor, "tolist", lambda tensor: counter.zeros(tensor))
        patch.setattr(script, "start", start_on_the_gpu)
        if spoil:
            patch.setattr(script, f"ncp_{kind}", spoiled)
        script.main(argv)
    return {**counter.found, "operations": counter.operations}


CASES: dict[str, Any] = {  # script, model, cached, arguments
    "dpo": ("dpo", "sd", True, ["--use_ema", "--max_train_steps", "2"]),
    "cpo": ("cpo", "sd", True, []),
    "sft": ("sft", "sd", True, []),
    "dpo of SDXL": ("dpo", "xl", True, []),
    "dpo of SDXL from pixels": ("dpo", "xl", False, []),
}
SPOILED: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda losses: losses.mean().item(),
    "copy": lambda losses: losses * torch.tensor([1.0, 1.0]).to(losses.device),
    "cpu": lambda losses: losses.detach().cpu(),
}


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        folder = Path(name)
        save_pipeline(folder / "sd")
        save_pipeline(folder / "xl", xl=True)
        save_dataset(folder / "data" / "train.parquet")
        common = ["--mixed_precision", "fp16", "--gradient_accumulation_steps", "2", "--max_train_steps", "1"]
        common += ["--use_8bit_adam", "false"]
        for case, (kind, model, cached, extra) in CASES.items():
            argv = arguments(folder, folder / case, *common, *extra, model=model)
            found[case] = waits(kind, argv, cached)
        for case, spoil in SPOILED.items():
            argv = arguments(folder, folder / case, *common)
            found[f"spoiled by {case}"] = waits("sft", argv, True, spoil)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
