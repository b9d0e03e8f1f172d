"""Whole runs in half precision: on a GPU if there is one, else fp16 with a scaler, and bf16, on the CPU.

Tested are: equality of policy and reference at the start, gradient scaling, skipped steps, accumulation, stopping and
going on, and every option that changes kernels. Arithmetic against float64 is in test_precision.py.
"""

import json
import os
import signal

import pytest
import torch
from halves import float16_on_cpu
from runs import altered, arguments, assert_same_weights, run_here, weights

from ncp.common.errors import DIVERGED, Stopped
from ncp.training.run import Run

GPU = torch.cuda.is_available()
FIRST_SCALE = 2.0**17  # 2^16 for each of two accumulated micro-batches


@pytest.fixture(autouse=True)
def half(monkeypatch):
    if not GPU:
        float16_on_cpu(monkeypatch)


@pytest.fixture
def figures(monkeypatch):
    """The log's entries."""
    found = []
    monkeypatch.setattr(Run, "_track", lambda run, entry, step: found.append(entry))
    return found


def accumulated(assets, out, *extra: str, precision: str = "fp16", model: str = "sd") -> list[str]:
    half = ["--mixed_precision", precision, "--gradient_accumulation_steps", "2", "--checkpointing_steps", "1"]
    return arguments(assets, out, *half, *extra, model=model)


@pytest.mark.parametrize(("precision", "model"), [("fp16", "sd"), ("fp16", "xl"), ("bf16", "xl")])
def test_policy_and_reference_begin_equal(assets, tmp_path, figures, precision, model):
    seen = []
    steps = altered("dpo", lambda call, losses: seen.append(losses.detach().cpu()) or losses)
    run = run_here("dpo", accumulated(assets, tmp_path / "out", precision=precision, model=model), **steps)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    assert run.models.dtype == dtype and run.models.lora_parameters[0].dtype == torch.float32
    of_f = run.models.encoder.dtype
    assert of_f == (torch.float16 if GPU or precision == "fp16" else torch.float32)
    assert run.models.secant == ("1" if of_f == torch.float32 else "auto")
    assert model == "sd" or run.models.pipe.vae.dtype == torch.float32  # which its config asks for
    assert torch.equal(torch.cat(seen[:2]), torch.full((4,), 2.0).log()) and not torch.equal(seen[2], seen[0])
    assert [f["skipped_steps"] for f in figures] == [0, 0] and all(f["grad_norm"] > 0 for f in figures)
    assert precision == "bf16" or run.accelerator.scaler.get_scale() == FIRST_SCALE
    first, last = weights(tmp_path / "out" / "checkpoint-1"), weights(tmp_path / "out")
    assert all(v.isfinite().all() for v in last.values()) and any(not torch.equal(first[k], last[k]) for k in first)


def test_accumulation_gives_the_gradient_of_one_batch(assets, tmp_path, figures):
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        split = ["--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        run_here("dpo", accumulated(assets, tmp_path / f"out-{batch}", *split, "--max_train_steps", "1"))
    norms = [f["grad_norm"] for f in figures]
    # Each split rounds otherwise; one that is not divided by its number would be two or four times as large.
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3, rel=0.03)


# ---------------------------------------------------------------- the gradient scaler


def overflow(losses: torch.Tensor) -> torch.Tensor:
    return losses + 1e36 * (losses - losses.detach())  # adds nothing, with a slope that fp16 does not hold


def test_an_overflow_halves_the_scale_and_is_no_failure(assets, tmp_path, figures):
    out = tmp_path / "out"
    # In the first micro-batch of step 2; the second is sound.
    steps = altered("dpo", lambda call, losses: overflow(losses) if call == 3 else losses)
    extra = ["--max_train_steps", "3", "--max_skipped_steps", "1", "--use_ema"]
    run = run_here("dpo", accumulated(assets, out, *extra), **steps)
    assert [f["skipped_steps"] for f in figures] == [0, 1, 0]
    assert run.accelerator.scaler.get_scale() == FIRST_SCALE / 2
    assert not (out / "skipped_steps.jsonl").exists() and run.average.optimization_step == 2
    before, after, last = (weights(out / f"checkpoint-{n}") for n in (1, 2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(after[k], last[k]) for k in after) and all(v.isfinite().all() for v in last.values())


def test_a_sample_that_is_not_finite_counts_although_there_is_a_scale_to_lower(assets, tmp_path):
    out = tmp_path / "out"
    harm = altered("dpo", lambda call, losses: losses * losses.new_tensor([1, torch.nan]) if call == 3 else losses)
    with pytest.raises(Stopped, match="at step 2: 1 steps in a row") as stop:
        run_here("dpo", accumulated(assets, out, "--max_train_steps", "3", "--max_skipped_steps", "1"), **harm)
    assert stop.value.status == DIVERGED
    (entry,) = map(json.loads, (out / "skipped_steps.jsonl").read_text().splitlines())
    assert entry["step"] == 2 and len(entry["pairs"]) == 1


def test_a_run_goes_on_with_the_scale_it_had(assets, tmp_path):
    steps = altered("dpo", lambda call, losses: overflow(losses) if call == 1 else losses)
    run_here("dpo", accumulated(assets, tmp_path / "out"), **steps)
    argv = accumulated(assets, tmp_path / "out", "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert run_here("dpo", argv).accelerator.scaler.get_scale() == FIRST_SCALE / 2


# ---------------------------------------------------------------- stopping, and options that change kernels


@pytest.mark.parametrize("precision", ["fp16", "bf16"] if GPU else ["fp16"])
def test_a_stopped_run_ends_with_the_same_bits(assets, tmp_path, precision):
    def send(call, losses):
        if call == 3:  # in the middle of step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    exact = ["--deterministic", "true", "--max_train_steps", "3"]
    try:
        run_here("dpo", accumulated(assets, tmp_path / "whole", *exact, precision=precision))
        argv = accumulated(assets, tmp_path / "out", *exact, precision=precision)
        with pytest.raises(Stopped, match="at step 2"):
            run_here("dpo", argv, **altered("dpo", send))
        run_here("dpo", [*argv, "--resume_from_checkpoint", "latest"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


OPTIONS = {
    "checkpointing": ["--gradient_checkpointing", "true"],
    "channels last": ["--channels_last", "true"],
    "AdamW of torch": ["--use_8bit_adam", "false"],
    "compiled": ["--torch_compile", "true"],
}
ON_A_GPU = ("compiled",)  # test_models.py has it in float32


@pytest.fixture(scope="module")
def plain(assets, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            float16_on_cpu(patch)
        found = []
        patch.setattr(Run, "_track", lambda run, entry, step: found.append(entry))
        run_here("dpo", accumulated(assets, tmp_path_factory.mktemp("plain") / "out"))
    return found


@pytest.mark.parametrize("option", [name for name in OPTIONS if GPU or name not in ON_A_GPU])
def test_options_leave_the_losses_alone(assets, tmp_path, plain, figures, option):
    run = run_here("dpo", accumulated(assets, tmp_path / "out", *OPTIONS[option]))
    for ours, theirs in zip(figures, plain, strict=True):
        assert ours["policy_w"] == pytest.approx(theirs["policy_w"], rel=0.05)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    state = {v.dtype for entry in run.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)}
    assert (torch.uint8 in state) is (option != "AdamW of torch")
