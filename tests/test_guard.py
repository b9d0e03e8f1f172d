"""What ends a run early or makes it skip a step: signals, the clock, losses that are not finite, drifting winners."""

import json
import os
import re
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from runs import SCRIPTS, altered, arguments, as_a_process, assert_same_weights, run_here, timesteps, weights
from support import ROOT, ranks_of, wait_for

import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import DIVERGED, INTERRUPTED, Stopped, UserError
from ncp.training import guard
from ncp.training.checkpoints import fault, newest, read_manifest
from ncp.training.pairs import open_pairs
from ncp.training.run import Run
from ncp.training.samples import PairDataset
from ncp.training.weights import WEIGHTS


def nan_loss(losses):
    return losses * losses.new_tensor([1.0, float("nan")])


def nan_gradient(losses):
    return losses + (losses - losses.detach()).abs().sqrt()  # adds nothing, with an infinite slope


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("harm", [nan_loss, nan_gradient])
def test_a_step_that_is_not_finite_is_skipped_and_named(assets, tmp_path, capsys, kind, harm):
    extra = ["--max_train_steps", "3", "--checkpointing_steps", "1", "--use_ema"]
    steps = altered(kind, lambda call, losses: harm(losses) if call == 2 else losses)
    out = tmp_path / "out"
    run_here(kind, arguments(assets, out, *extra), **steps)
    before, after, last = (weights(out / f"checkpoint-{n}") for n in (1, 2, 3))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert any(not torch.equal(after[k], last[k]) for k in after) and all(v.isfinite().all() for v in last.values())
    states = [torch.load(out / f"checkpoint-{n}" / "optimizer.pt", weights_only=True) for n in (1, 2, 3)]
    shadows = [torch.cat([p.flatten() for p in s["ema"]["shadow_params"]]) for s in states]
    assert torch.equal(shadows[0], shadows[1]) and not torch.equal(shadows[1], shadows[2])
    assert states[1]["ema"]["optimization_step"] == 1
    (entry,) = map(json.loads, (out / "skipped_steps.jsonl").read_text().splitlines())
    dataset = open_pairs(parse(SCRIPTS[kind].Config, arguments(assets, out)))
    config = parse(SCRIPTS[kind].Config, arguments(assets, out))
    order = PairDataset(config, dataset, (4, 16, 16), timesteps(config), images=2)
    batch = [dataset.name(order.pair_index(n)) for n in (2, 3)]  # positions of step 2
    suspects = batch[1:] if harm is nan_loss else batch
    assert entry["step"] == 2 and [{k: p[k] for k in p if k != "loss"} for p in entry["pairs"]] == suspects
    error = capsys.readouterr().err
    assert "step 2 skipped" in error and suspects[0]["winner"] in error and "step 3 skipped" not in error


def test_many_skipped_steps_in_a_row_end_the_run(assets, tmp_path):
    extra = ["--max_train_steps", "9", "--checkpointing_steps", "2", "--max_skipped_steps", "2"]
    # One bad step, a good one, then bad ones only.
    steps = altered("dpo", lambda call, losses: nan_loss(losses) if call == 2 or call > 3 else losses)
    with pytest.raises(Stopped, match=r"at step 5: 2 steps in a row .* last good checkpoint: .*checkpoint-4;") as stop:
        run_here("dpo", arguments(assets, tmp_path / "out", *extra), **steps)
    assert stop.value.status == DIVERGED
    assert not (tmp_path / "out" / WEIGHTS).exists()
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert all(v.isfinite().all() for v in weights(folder).values())


@pytest.mark.parametrize(("beta", "warned"), [("1e7", True), ("1", False)])
def test_a_run_that_starts_saturated_says_so(assets, tmp_path, capsys, beta, warned):
    # |logit| = beta |L_w - L_l|; the random model's losses differ by about 1e-2 between two images.
    extra = ["--space", "latent", "--beta", beta, "--lam", "1", "--max_train_steps", "1"]
    run_here("cpo", arguments(assets, tmp_path / "out", *extra))
    assert ("starts saturated: |logit| is above 5 for more than 75%" in capsys.readouterr().err) is warned


def test_weights_that_are_not_finite_are_never_saved(assets, tmp_path):
    original = SCRIPTS["sft"].ncp_sft

    def ruin(models, unet, batch, config):
        losses, metrics = original(models, unet, batch, config)
        models.lora_parameters[0].data[0] = float("inf")  # after the forward pass: this step's loss is finite
        return losses, metrics

    with pytest.raises(Stopped, match="the LoRA weights are not finite; there is no checkpoint"):
        run_here("sft", arguments(assets, tmp_path / "out", "--max_train_steps", "1"), ncp_sft=ruin)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_fp16_lowers_its_scale_and_is_not_counted_while_it_can(assets, tmp_path):
    with as_a_process():
        accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (tmp_path / "out").mkdir()
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path / "out", "--max_skipped_steps", "2"))
    watched, weight = guard.Guard(config, accelerator, open_pairs(config), {}), torch.nn.Parameter(torch.zeros(1))
    optimizer, scales = torch.optim.SGD([weight], lr=1.0), []
    for step in range(1, 6):
        accelerator.scaler.scale(weight.sum()).backward()
        weight.grad.fill_(float("inf"))
        accelerator.scaler.unscale_(optimizer)
        watched.add({"pair": [0]}, torch.tensor([0.7]), {})
        assert not watched.check_step(step, weight.grad.norm())
        scales.append(accelerator.scaler.get_scale())
        if watched.stopped:
            break
    assert scales == [2, 1, 0.5, 0.25]  # below 1 an overflow is none of the scale's making
    with pytest.raises(Stopped):
        watched.close()


# ---------------------------------------------------------------- signals and the clock


@pytest.mark.parametrize("number", guard.SIGNALS)
def test_a_signal_finishes_the_step_and_the_run_goes_on_to_the_same_end(assets, tmp_path, number):
    extra = ["--max_train_steps", "3", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "9"]
    run_here("dpo", arguments(assets, tmp_path / "whole", *extra))
    before = signal.getsignal(number)

    def send(call, losses):
        if call == 3:  # in the middle of step 2
            os.kill(os.getpid(), number)
        return losses

    with pytest.raises(Stopped, match=f"by {signal.Signals(number).name} at step 2.*checkpoint-2") as stop:
        run_here("dpo", arguments(assets, tmp_path / "out", *extra), **altered("dpo", send))
    assert stop.value.status == INTERRUPTED and signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    run_here("dpo", arguments(assets, tmp_path / "out", *extra, "--resume_from_checkpoint", "latest"))
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_max_train_hours_ends_a_run_in_the_same_way(assets, tmp_path):
    extra = ["--max_train_steps", "50", "--max_train_hours", "1e-6"]
    with pytest.raises(Stopped, match=r"after max_train_hours \(1e-06\) at step 1.*checkpoint-1") as stop:
        run_here("cpo", arguments(assets, tmp_path / "out", *extra))
    assert stop.value.status == INTERRUPTED and (tmp_path / "out" / "checkpoint-1").is_dir()


# Two pictures of 3 sampler steps: calls 1 to 3 draw the reference, 4 to 6 the model of step 1, 7 to 9 that of the end.
DRAWN = ["--validation_prompts", "[one, two]", "--validation_num_inference_steps", "3", "--validation_steps", "1"]


@pytest.mark.parametrize(("kind", "call", "step"), [("dpo", 2, 1), ("cpo", 5, 1), ("sft", 8, 2)])
def test_a_signal_while_pictures_are_drawn_is_heeded_at_once(assets, tmp_path, monkeypatch, kind, call, step):
    extra = ["--max_train_steps", "2", "--checkpointing_steps", "9", "--use_ema", *DRAWN]
    run_here(kind, arguments(assets, tmp_path / "whole", *extra))
    calls, between = [], guard.Guard.between

    def send(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        between(*args)

    with monkeypatch.context() as patch:
        patch.setattr(guard.Guard, "between", send)
        with pytest.raises(Stopped, match=f"by SIGTERM at step {step};.*checkpoint-{step}$") as stop:
            run_here(kind, arguments(assets, tmp_path / "out", *extra))
    assert stop.value.status == INTERRUPTED and len(calls) == call
    assert fault(tmp_path / "out" / f"checkpoint-{step}") is None
    names = sorted(p.name for p in (tmp_path / "out").glob("validation/*"))
    assert names == ["step-000001.png"][: step - 1] and not (tmp_path / "out" / WEIGHTS).exists()
    run_here(kind, arguments(assets, tmp_path / "out", *extra, "--resume_from_checkpoint", "auto"))
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    for name in ("step-000001.png", "step-000002.png"):
        assert (tmp_path / "out/validation" / name).read_bytes() == (tmp_path / "whole/validation" / name).read_bytes()


def test_a_signal_while_held_out_pairs_are_measured_is_heeded_at_once(assets, tmp_path, monkeypatch):
    """6 pairs in batches of 2: calls 1 to 3 measure the reference, 4 is step 1, 5 to 7 look at it."""
    extra = ["--max_train_steps", "3", "--checkpointing_steps", "1", "--heldout_pairs", "6", "--heldout_steps", "1"]
    logged: dict[str, dict] = {"whole": {}, "out": {}}

    def go(name: str, *more: str, **steps) -> None:
        monkeypatch.setattr(Run, "_track", lambda _, figures, step: logged[name].setdefault(step, {}).update(figures))
        run_here("dpo", arguments(assets, tmp_path / name, *extra, *more), **steps)

    go("whole")
    calls = []

    def send(call, losses):
        calls.append(call)
        if call == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return losses

    with pytest.raises(Stopped, match=r"by SIGINT at step 1;.*checkpoint-1$"):
        go("out", **altered("dpo", send))
    assert calls == [1, 2, 3, 4, 5] and "heldout_winner_drift" not in logged["out"][1]
    assert read_manifest(tmp_path / "out" / "checkpoint-1")["owes_look"]
    go("out", "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert [read_manifest(tmp_path / "out" / f"checkpoint-{n}")["owes_look"] for n in (2, 3)] == [False] * 2
    for step in (1, 2, 3):
        looks = [{k: v for k, v in logged[n][step].items() if k.startswith("heldout")} for n in logged]
        assert len(looks[0]) == 2 and looks[0] == looks[1]


def test_a_run_that_is_started_too_late_for_its_pictures_draws_them_the_next_time(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "1", *DRAWN, "--max_train_hours", "1e-6")
    with pytest.raises(Stopped, match="after max_train_hours"):
        run_here("sft", argv)
    run_here("sft", [*argv, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "out" / "validation" / "step-000001.png").is_file()


# Rank 1 is sent a signal while it waits for the pictures that rank 0 draws.
WAITING = """
import os, signal, train_ncp_sft as script
from ncp.common.errors import run_program
from ncp.training.guard import Guard
from ncp.training.pictures import Validation
agree, calls, draw = Guard._agree, [], Validation.draw
def counted(*args):
    Guard._agree = count
    draw(*args)
def count(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return agree(*args)
Validation.draw = counted
try:
    run_program(script.main)
finally:
    print("agreed", len(calls))
"""


def test_a_signal_to_a_process_that_waits_for_pictures_is_heeded_by_all(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "9", "--heldout_pairs", "3", *DRAWN)
    argv += ["--heldout_steps", "1", "--train_batch_size", "1"]  # 2 of the pairs for one process, 1 for the other
    argv += ["--validation_num_inference_steps", "50"]
    with ranks_of(WAITING, argv) as ranks:
        said = [r.communicate(timeout=300) for r in ranks]
    assert [r.returncode for r in ranks] == [INTERRUPTED] * 2, said
    assert "stopped by SIGUSR1 at step 1;" in said[0][1] and all("agreed 3" in out for out, _ in said), said
    assert newest(tmp_path / "out")[0].name == "checkpoint-1"


# Two processes as srun would start them: rank 1 gets a NaN at step 2, and a signal in step 3 if argv says so.
RANK = """
import gc, os, sys, signal, torch, train_ncp_dpo as script
from ncp.common.errors import run_program
original, calls, leave = script.ncp_dpo, [], torch.distributed.destroy_process_group
def step(m, unet, batch, config):
    losses, metrics = original(m, unet, batch, config)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        losses = losses * torch.tensor([float("nan"), 1.0])
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return losses, metrics
def left(*args):
    alive = any(isinstance(o, torch.nn.parallel.DistributedDataParallel) for o in gc.get_objects())
    print("left with DDP" if alive else "left without DDP", file=sys.stderr)
    leave(*args)
script.ncp_dpo, torch.distributed.destroy_process_group = step, left
run_program(script.main)
"""


def test_all_processes_skip_and_stop_together(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "9", "--checkpointing_steps", "1")
    argv += ["--cache_dir", str(tmp_path / "cold")]  # which both build at once
    with ranks_of(RANK, argv) as ranks:
        said = [r.communicate(timeout=300) for r in ranks]
    assert [r.returncode for r in ranks] == [INTERRUPTED] * 2, said
    assert said[0][1].count("stopped by SIGUSR1 at step 3") == 1 and "stopped" not in said[1][1]
    assert all("left without DDP" in error for _, error in said), said  # the other order hangs, one time in a few
    assert "step 2 skipped" in said[0][1] and "Traceback" not in said[0][1] + said[1][1]
    assert "effective batch" in said[0][0] and not said[1][0].strip()  # the main process alone talks
    (entry,) = map(json.loads, (tmp_path / "out" / "skipped_steps.jsonl").read_text().splitlines())
    assert entry["step"] == 2 and len(entry["pairs"]) == 1
    one, two, three = (weights(tmp_path / "out" / f"checkpoint-{n}") for n in (1, 2, 3))
    assert all(torch.equal(one[k], two[k]) for k in one) and any(not torch.equal(two[k], three[k]) for k in two)


@pytest.mark.parametrize("again", [False, True])
def test_a_launched_run_leaves_with_its_status_and_a_second_signal_ends_it_at_once(assets, tmp_path, again):
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "100000", "--checkpointing_steps", "3")
    argv += ["--dataloader_num_workers", "2"]
    slow = "import time, train_ncp_dpo as s\nfrom ncp.common.errors import run_program\noriginal = s.ncp_dpo\n"
    slow += f"s.ncp_dpo = lambda *a: (time.sleep({20 if again else 0}) if [*__import__('pathlib').Path(a[3].output_dir)"
    slow += ".glob('checkpoint-*')] else None, original(*a))[1]\nrun_program(s.main)"
    with ranks_of(slow, argv, count=1) as (process,):
        assert wait_for(lambda: (tmp_path / "out" / "checkpoint-3").is_dir())
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)  # the workers too, as a scheduler does
        if again:
            time.sleep(guard.ONE_KEYSTROKE + 0.3)
            os.killpg(process.pid, signal.SIGTERM)
        began = time.monotonic()
        _, error = process.communicate(timeout=300)
        took = time.monotonic() - began
    lines = [line for line in error.replace("\r", "\n").splitlines() if "stopped" in line]
    assert "Traceback" not in error
    if again:
        assert process.returncode == -signal.SIGTERM and took < 5 and not lines
    else:
        assert process.returncode == INTERRUPTED and len(lines) == 1 and "by SIGTERM" in lines[0]
    checkpoint, skipped = newest(tmp_path / "out")
    assert checkpoint is not None and not skipped


# ---------------------------------------------------------------- held-out pairs


def test_held_out_pairs_never_train_and_are_the_same_for_any_seed(assets, tmp_path):
    def make(*extra):
        config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, *extra))
        pairs = open_pairs(config)
        return pairs, PairDataset(config, pairs, (4, 16, 16), timesteps(config), images=2)

    pairs, dataset = make("--heldout_pairs", "3")
    other, _ = make("--heldout_pairs", "3", "--seed", "7")
    assert len(pairs) == 9 and pairs.rows[9:].tolist() == other.rows[9:].tolist() == [2, 6, 10]
    assert sorted({dataset.pair_index(n) for n in range(40)}) == list(range(9))
    assert sorted([*pairs.rows[:9].tolist(), 2, 6, 10]) == list(range(12))
    few, _ = make("--heldout_pairs", "3", "--max_train_samples", "2")
    assert few.rows.tolist() == [0, 1, 2, 6, 10] and len(few) == 2
    samples = [dataset.heldout(k) for k in range(3)]
    assert [s["pair"] for s in samples] == [9, 10, 11]
    assert [int(s["timestep"]) for s in samples] == [167, 500, 833]  # middles of thirds of 1 ... 999
    assert torch.equal(samples[1]["eps"], make("--heldout_pairs", "3")[1].heldout(1)["eps"])
    with pytest.raises(UserError, match=r"heldout_pairs is 12; .* has 12 decisive pairs of 12 prompts; .* none"):
        make("--heldout_pairs", "12")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_loses_its_winners_warns_and_stops_if_told(assets, tmp_path, capsys, kind):
    # The trained pipeline: a random one has little to lose.
    extra = ["--pretrained_model_name_or_path", str(ROOT / "tiny/model"), "--dataset_name", str(ROOT / "tiny/data")]
    extra += ["--resolution", "64", "--learning_rate", "0.05", "--max_train_steps", "4"]
    extra += ["--heldout_pairs", "4", "--heldout_steps", "2"]
    extra += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "1"]
    run_here(kind, arguments(assets, tmp_path / "warned", *extra))
    out, said = capsys.readouterr()
    assert said.count("warning: at step") == 1 and "median held-out winner's loss" in said
    assert re.search(r" [1-9]\d* set aside with a prompt or image that is held out; 4 held out\n", out)
    stops = ["--max_winner_drift", "0.2", "--warn_winner_drift", "0.01"]
    with pytest.raises(Stopped, match=r"at step 2: .*max_winner_drift 20.0%\).*last good checkpoint.*-1;") as stop:
        run_here(kind, arguments(assets, tmp_path / "stopped", *extra, *stops))
    assert stop.value.status == DIVERGED
    # The one before is not pruned for the one that the run stopped with.
    assert sorted(p.name for p in (tmp_path / "stopped").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("kind", SCRIPTS)
def test_drift_is_zero_at_the_reference_and_does_not_disturb_the_run(assets, tmp_path, monkeypatch, kind):
    seen, original = [], guard.Guard.watch
    monkeypatch.setattr(guard.Guard, "watch", lambda *a: seen.append(original(*a)) or seen[-1])
    extra = ["--heldout_pairs", "5", "--heldout_steps", "1", "--learning_rate", "1e-12", "--max_train_steps", "1"]
    run_here(kind, arguments(assets, tmp_path / "out", *extra))
    assert seen[0]["heldout_winner_drift"] == pytest.approx(0, abs=1e-5)
    assert ("heldout_accuracy" in seen[0]) == (kind != "sft")
    files = []
    for steps in ("1", "100"):
        more = ["--heldout_pairs", "5", "--heldout_steps", steps]
        run_here(kind, arguments(assets, tmp_path / steps, *more))
        files.append(weights(tmp_path / steps))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
