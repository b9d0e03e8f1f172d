"""What keeps the loser from ruining the winner: each option against values worked by hand, and in the scripts."""

import math
from types import SimpleNamespace

import pytest
import torch
from pipelines import save_dataset
from preference_sets import SETS, prepared, save_chosen_rejected
from runs import (
    SCRIPTS,
    arguments,
    assert_same_weights,
    call,
    loaded,
    refusal,
    run_here,
    small_dataset,
    weights,
)
from support import ranks_of

import cache_latents
import filter_pickapic
import ncp.training.run
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.losses import cpo_loss, dpo_loss, logistic_loss, preserve_winners
from ncp.training.pairs import open_pairs
from tiny.precision import KEYS, measured, setting

# ---------------------------------------------------------------- winner_preserving_mu


def squares(*rows: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, outputs) of rows that are their own gradients: |x|^2 / 2."""
    output = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    return output.square().sum(1) / 2, output


@pytest.mark.parametrize(
    ("winner", "loser", "mu", "scale"),
    [
        ((1.0, 0.0), (2.0, 3.0), 0.0, 0.5),  # |g_w|^2 = 1, <g_l, g_w> = 2
        ((1.0, 0.0), (2.0, 3.0), 0.1, 0.45),
        ((1.0, 0.0), (2.0, 3.0), 1.0, 0.0),
        ((3.0, 4.0), (4.0, 4.5), 0.4, 0.5),  # 25 and 30: 0.6 * 25 / 30
        ((3.0, 4.0), (0.3, 0.4), 0.5, 1.0),  # 25 and 2.5: 5, so 1
        ((1.0, 0.0), (-2.0, 3.0), 1.0, 1.0),  # they work against each other
        ((1.0, 0.0), (0.0, 9.0), 1.0, 1.0),
        ((0.0, 0.0), (2.0, 3.0), 0.5, 1.0),  # as at zero terminal SNR
    ],
)
def test_the_losers_gradient_is_scaled_by_hand(winner, loser, mu, scale):
    # Beside it a second pair, which has a lambda of its own: 0.5 (1 - mu).
    losses, output = squares(winner, (1.0, 0.0), loser, (2.0, 0.0))
    kept = preserve_winners(losses, output, mu)
    assert torch.equal(kept, losses)
    upstream = torch.tensor([7.0, 1.0, -3.0, 1.0])
    (gradient,) = torch.autograd.grad((upstream * kept).sum(), output)
    expected = [[7 * x for x in winner], [1, 0], [-3 * scale * x for x in loser], [2 * min(1, (1 - mu) / 2), 0]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_without_mu_or_without_a_gradient_nothing_is_done():
    losses, output = squares((1.0, 0.0), (2.0, 3.0))
    assert preserve_winners(losses, output, None) is losses
    with torch.no_grad():
        losses = output.square().sum(1)
        assert preserve_winners(losses, output, 0.5) is losses


def test_what_is_below_the_loss_is_differentiated_once():
    passes = []
    weight = torch.ones(1, requires_grad=True)
    output = torch.tensor([[1.0], [2.0]]) * weight
    between = output * 1
    between.register_hook(lambda _: passes.append(1))
    preserve_winners(between.square().sum(1), output, 0.5).sum().backward()
    # d/dw: winner 2, loser 8 scaled by 0.5 * 4 / 8.
    assert passes == [1] and weight.grad.item() == 2 + 4 * 2 * 0.25


@pytest.mark.parametrize("space", ["perceptual", "latent"])
@pytest.mark.parametrize("kind", ["dpo", "cpo"])
def test_a_step_on_the_outputs_does_not_raise_the_winners_loss(assets, tmp_path, kind, space):
    """The loser is the winner's image, with three times its error and more: to worsen it is to worsen the winner.

    The step is the script's own: the sum of what it asks of the two outputs, as if their weights were the same. How the
    winner's loss changes along it is measured as a central difference, in units of the change by the winner's part.
    """
    script = SCRIPTS[kind]
    keys = ["--space", space, "--beta", "1", *(["--lam", "0"] if kind == "cpo" else [])]
    configs = {
        mu: parse(script.Config, arguments(assets, tmp_path, *keys, "--winner_preserving_mu", mu))
        for mu in ("null", "0", "0.5")
    }
    models, batch = loaded(configs["null"], images=2)
    for key in ("pixels", "z", "posterior", "time_ids"):
        batch[key] = batch[key].chunk(2)[0].repeat(2, *[1] * (batch[key].ndim - 1))
    error, other = torch.randn((2, *batch["eps"].shape), generator=torch.Generator().manual_seed(0))
    winner, loser = batch["eps"] + error, batch["eps"] + 3 * error + other

    def objective(config, winner):
        output = torch.cat([winner, loser]).requires_grad_()
        losses, metrics = getattr(script, f"ncp_{kind}")(
            models, lambda *_, **__: SimpleNamespace(sample=output), batch, config
        )
        return output, losses, metrics["policy_w"]

    def change(direction):
        """Of each pair's winner's loss, along a direction per pair."""
        h = 0.02 * error.norm() / own.norm()
        with torch.no_grad():
            ahead, behind = (objective(configs["null"], winner + sign * h * direction)[2] for sign in (1, -1))
        return (ahead - behind) / 2

    asked, values = {}, {}
    for mu, config in configs.items():
        output, values[mu], _ = objective(config, winner)
        asked[mu] = [-g for g in torch.autograd.grad(values[mu].sum(), output)[0].chunk(2)]
    own = asked["null"][0]
    assert torch.equal(values["null"], values["0"]) and torch.equal(values["null"], values["0.5"])
    for of_winner, _ in asked.values():
        torch.testing.assert_close(of_winner, own, rtol=1e-4, atol=1e-6 * float(own.abs().max()))
    unit = -change(own)
    assert (unit > 0).all()
    assert (change(sum(asked["null"])) > unit).all()  # 2 in latent space, where the loser's gradient is 3 times it
    torch.testing.assert_close(change(sum(asked["0"])) / unit, torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(change(sum(asked["0.5"])) / unit, torch.full((2,), -0.5), atol=0.03, rtol=0)


@pytest.mark.parametrize("space", ["perceptual", "latent"])
def test_in_float16_the_scaled_gradient_is_that_of_float32(space):
    s, t = setting("embedded", 2), torch.tensor([30, 500])
    half, full, off = (
        measured(s, "dpo", dtype, t, space=space, winner_preserving_mu=mu).gradient
        for dtype, mu in ((torch.float16, 0.5), (torch.float32, 0.5), (torch.float32, None))
    )
    assert torch.nn.functional.cosine_similarity(half, full, dim=0) > 0.99
    # In latent space the margin itself is coarse in float16, and with it the sigmoid's weight.
    assert half.norm() / full.norm() == pytest.approx(1, abs=0.03 if space == "perceptual" else 0.06)
    assert torch.nn.functional.cosine_similarity(off, full, dim=0) < 0.99


def test_accumulated_and_checkpointed_it_is_the_same_step(assets, tmp_path):
    extra = ["--winner_preserving_mu", "0.5", "--use_8bit_adam", "false", "--adam_epsilon", "1e-3"]
    run_here("dpo", arguments(assets, tmp_path / "one", *extra))
    split = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "true"]
    run_here("dpo", arguments(assets, tmp_path / "two", *extra, *split))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    most = max(v.abs().max() for k, v in one.items() if "lora_B" in k or "lora.up" in k)
    assert all((one[k] - two[k]).abs().max() < 1e-3 * most for k in one)


# ---------------------------------------------------------------- utility


def pair(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in values]


@pytest.mark.parametrize(
    ("d", "weight"), [(0.0, 0.5), (0.5, 0.7), (-0.5, 0.3), (1.2, 0.98), (1.25, 0.99), (9.0, 0.99), (-9.0, 0.01)]
)
def test_the_linear_utility_by_hand(d, weight):
    # beta 1, so beta d = d and w = 0.5 + 0.4 d between 0.01 and 0.99. policy_w - ref_w = d + 1, policy_l - ref_l = 1.
    values = pair(3 + d, 2.0, 2.0, 1.0)
    losses, metrics = dpo_loss(*values, beta=1.0, utility="linear", eta=0.01)
    assert losses.item() == pytest.approx(weight * (1 + d)) and metrics["margin"].item() == pytest.approx(-d)
    losses.sum().backward()
    # The weight has no gradient; nor have the references, of which the loss depends on nothing but the weight.
    assert [v.grad.item() if v.grad is not None else 0 for v in values] == pytest.approx([weight, -weight, 0, 0])


def test_the_linear_weight_beside_the_logistic_one():
    """In the published code logistic is -logsigmoid(-0.5 B d), and the linear weight 0.5 + 0.2 B d, with B = 2 beta.

    So it is 0.5 + 0.4 beta d. The logistic one, sigmoid(beta d), has the same sign and at the centre the same value,
    and a slope of beta / 4: the line is 1.6 times as steep.
    """
    beta, h = 2500.0, 1e-8

    def weight(d: float, utility: str) -> float:
        values = pair(1e-3 + d, 1e-3, 1e-3, 1e-3)
        losses, _ = dpo_loss(*values, beta=beta, utility=utility, eta=0.0)
        return torch.autograd.grad(losses.sum(), values[0])[0].item() / beta

    assert weight(0.0, "linear") == weight(0.0, "logistic") == 0.5
    slope = {u: (weight(h, u) - weight(-h, u)) / (2 * h) for u in ("linear", "logistic")}
    assert slope["logistic"] == pytest.approx(beta / 4, rel=1e-6)
    assert slope["linear"] == pytest.approx(0.2 * (2 * beta), rel=1e-6)
    for d in (-1e-4, 1e-4):  # a winner that got worse has more weight with both
        assert (weight(d, "linear") - 0.5) * d > (weight(d, "logistic") - 0.5) * d > 0


def test_without_beta_the_linear_gradient_would_be_below_adams_epsilon():
    """Why the loss has the factor: in perceptual space, with it 3% of the gradient's elements are, without it 97%."""
    ours = measured(setting("embedded", 2), "dpo", torch.float32, torch.tensor([30, 500]), utility="linear").gradient
    ours = ours[ours != 0].abs()
    beta = KEYS["dpo"]["beta"]
    assert (ours < 1e-8).double().mean() < 0.1 < 0.9 < (ours / beta < 1e-8).double().mean()


# ---------------------------------------------------------------- soft_labels

SHARES = [0.8, 0.3, 0.5, 0.55, 1.0, 0.9]  # of image 0, in preference_sets.rapidata; 0.5 is a tie


def test_soft_labels_by_hand():
    # -log sigmoid(1) = 0.3132617, -log sigmoid(-1) = 1.3132617.
    (logit,) = pair(1.0)
    loss = logistic_loss(logit, torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.75 * 0.3132617 + 0.25 * 1.3132617, abs=1e-6)
    (slope,) = torch.autograd.grad(loss.sum(), logit)
    assert slope.item() == pytest.approx(1 / (1 + math.exp(-1)) - 0.75)  # sigmoid(z) - p
    (best,) = pair(math.log(3))  # where sigmoid(z) = 3/4
    (slope,) = torch.autograd.grad(logistic_loss(best, torch.tensor([0.75])).sum(), best)
    assert slope.item() == pytest.approx(0, abs=1e-7)
    assert torch.equal(logistic_loss(logit, torch.ones(1)), logistic_loss(logit, None))


def test_soft_labels_in_both_objectives():
    share = torch.tensor([0.75])
    # logit = -2 ((0.1 - 0.3) - (0.5 - 0.2)) = 1, as in test_losses.
    losses, _ = dpo_loss(*pair(0.1, 0.5, 0.3, 0.2), beta=2.0, share=share)
    assert losses.item() == pytest.approx(0.5632617, abs=1e-6)
    # logit = -2.5 (0.1 - 0.5) = 1; + 3 * 0.1
    losses, _ = cpo_loss(*pair(0.1, 0.5), beta=2.5, lam=3.0, share=share)
    assert losses.item() == pytest.approx(0.8632617, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "way"), [("dpo", "prepared"), ("dpo", "filtered"), ("dpo", "cached"), ("cpo", "prepared")]
)
def test_shares_of_a_prepared_dataset_reach_the_objective(assets, tmp_path, kind, way):
    rows, _ = prepared(SETS["rapidata"](tmp_path / "in"), tmp_path / "data")
    data, seen = tmp_path / "data", {}
    if way == "filtered":
        filter_pickapic.main(["--dataset_name", str(data), "--output_dir", str(tmp_path / "filtered")])
        data = tmp_path / "filtered"
    extra = ["--dataset_name", str(data), "--soft_labels", "true", "--train_batch_size", "5", "--max_train_steps", "1"]
    if way == "cached":
        extra += ["--cached_latents", str(tmp_path / "cache")]
        call(cache_latents.main, arguments(assets, tmp_path / "c", *extra))
    argv = arguments(assets, tmp_path / "out", *extra)
    original = getattr(SCRIPTS[kind], f"ncp_{kind}")

    def objective(models, unet, batch, config):
        seen.update(zip(batch["pair"], batch["share_w"].tolist(), strict=True))
        return original(models, unet, batch, config)

    run_here(kind, argv, **{f"ncp_{kind}": objective})
    uids = {r["image_0_uid"]: share for r, share in zip(rows, SHARES, strict=True)}
    pairs = open_pairs(parse(SCRIPTS[kind].Config, argv))
    first = pairs.columns(["image_0_uid"])["image_0_uid"].to_pylist()
    assert len(seen) == 5
    for number, share in seen.items():
        assert share == pytest.approx(max(uids[first[number]], 1 - uids[first[number]]))
    run_here(kind, [*arguments(assets, tmp_path / "hard", *extra), "--soft_labels", "false"])
    soft, hard = weights(tmp_path / "out"), weights(tmp_path / "hard")
    assert any(not torch.equal(soft[k], hard[k]) for k in soft)


def test_a_row_without_a_share_counts_as_unanimous(tmp_path):
    _, dataset = small_dataset(tmp_path, "--soft_labels", share_0=[0.6, 0.4, None, float("nan"), *[0.9, 0.2] * 4])
    assert dataset.pairs.share.tolist() == pytest.approx([0.6, 0.6, 1, 1, *[0.9, 0.8] * 4])
    assert dataset[0]["share_w"].item() == pytest.approx(float(dataset.pairs.share[dataset[0]["pair"]]))
    _, dataset = small_dataset(tmp_path / "off", share_0=[0.6] * 12)
    assert dataset.pairs.share is None and "share_w" not in dataset[0]


REFUSED = {
    "no column": (None, r"has no shares of votes \(column share_0, which prepare_preferences.py fills in where"),
    "no share": ([None] * 12, "has no shares of votes"),
    "above 1": ([80.0, 0.2] * 6, "train.parquet row 0: share_0 is 80, and image 0 is the winner; expected a share"),
    "the loser's": ([0.9, 0.2, 0.3, 0.2] * 3, "train.parquet row 2: share_0 is 0.3, and image 0 is the winner"),
    "words": (["most"] * 12, "column share_0 is string; expected number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_soft_labels_without_shares_are_refused_before_loading(assets, tmp_path, monkeypatch, capsys, case):
    shares, message = REFUSED[case]
    monkeypatch.setattr(ncp.training.run, "load_models", lambda *_: pytest.fail("a model was loaded"))
    # pyarrow takes the type of a column of nulls from the schema; prepare_preferences.py writes float64.
    if shares == [None] * 12:
        import pyarrow as pa

        shares = pa.array(shares, pa.float64())
    data = save_dataset(tmp_path / "data" / "train.parquet", share_0=shares).parent
    argv = arguments(assets, tmp_path / "out", "--dataset_name", str(data), "--soft_labels", "true")
    with pytest.raises(UserError, match=message):
        run_here("dpo", argv)
    assert message.split("\\")[0] in refusal(SCRIPTS["cpo"].main, argv, capsys)
    assert not (tmp_path / "out").exists()


def test_soft_labels_of_chosen_and_rejected_are_refused(assets, tmp_path):
    save_chosen_rejected(tmp_path / "data" / "train.parquet")
    argv = arguments(assets, tmp_path / "out", "--dataset_name", str(tmp_path / "data"), "--cache_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"soft_labels: .* has no shares of votes"):
        run_here("dpo", [*argv, "--soft_labels"])


def test_a_linear_utility_has_no_soft_labels(assets, tmp_path, capsys):
    argv = arguments(assets, tmp_path / "out", "--soft_labels", "true", "--utility", "linear")
    assert "error: soft_labels needs utility: logistic" in refusal(SCRIPTS["dpo"].main, argv, capsys)


def test_other_shares_are_another_run(assets, tmp_path):
    for name, share in (("one", 0.9), ("two", 0.8)):
        save_dataset(tmp_path / name / "train.parquet", share_0=[share, 1 - share] * 6)
    extra = ["--soft_labels", "true", "--resume_from_checkpoint", "auto"]
    run_here("dpo", arguments(assets, tmp_path / "out", *extra, "--dataset_name", str(tmp_path / "one")))
    more = [*extra, "--max_train_steps", "3"]
    with pytest.raises(UserError, match=r"it has training pairs \w+ \(this run: "):
        run_here("dpo", arguments(assets, tmp_path / "out", *more, "--dataset_name", str(tmp_path / "two")))
    run_here("dpo", arguments(assets, tmp_path / "out", *more, "--dataset_name", str(tmp_path / "one")))


# ---------------------------------------------------------------- reference_decay


def following(assets, folder, *extra: str, decay: str = "0.75") -> list[str]:
    return arguments(assets, folder, "--reference_decay", decay, "--learning_rate", "1e-2", *extra)


def saved_reference(folder) -> list[torch.Tensor]:
    return torch.load(folder / "optimizer.pt", weights_only=True)["reference"]


def test_a_following_reference_starts_as_the_policy_and_shares_its_storage(assets, tmp_path):
    config = parse(SCRIPTS["dpo"].Config, following(assets, tmp_path))
    models, batch = loaded(config, images=2)
    lora = {n for n, p in models.unet.named_parameters() if p.requires_grad}
    assert [n for n, p in models.reference.named_parameters() if ".lora_" in n] == [
        n for n, p in models.unet.named_parameters() if n in lora
    ]
    assert not any(p.requires_grad for p in [*models.reference.parameters(), *models.base.parameters()])
    own = {p.data_ptr() for p in models.unet.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in models.base.parameters()} == own
    assert {p.data_ptr() for n, p in models.reference.named_parameters() if ".lora_" not in n} == own
    assert not {p.data_ptr() for p in models.reference_lora} & {p.data_ptr() for p in models.lora_parameters}
    _, metrics = SCRIPTS["dpo"].ncp_dpo(models, models.unet, batch, config)
    assert metrics["margin"].abs().max() == 0 and metrics["winner_drift"].abs().max() == 0

    before = [p.detach().clone() for p in models.reference_lora]
    for number, p in enumerate(models.lora_parameters):
        p.data.fill_(number / 1000)
    models.update_reference()
    for number, (old, new) in enumerate(zip(before, models.reference_lora, strict=True)):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * number / 1000)
    # It is used: it is neither the policy nor the original model any more.
    _, metrics = SCRIPTS["dpo"].ncp_dpo(models, models.unet, batch, config)
    _, of_base = SCRIPTS["dpo"].ncp_dpo(models, models.base, batch, config)
    assert metrics["margin"].abs().max() > 0 and of_base["margin"].abs().max() > 0


def test_with_decay_0_the_reference_is_the_policy_and_drift_is_seen_all_the_same(assets, tmp_path, monkeypatch):
    """Each step starts at log 2. What the held-out pairs say is against the original model, also in a resumed run."""
    found: dict[str, list] = {}
    extra = ["--heldout_pairs", "2", "--heldout_steps", "1", "--max_train_steps", "4", "--checkpointing_steps", "2"]

    def run(name: str, folder, *more: str) -> None:
        track = lambda run, figures, step: found.setdefault(name, []).append((step, figures))  # noqa: E731
        monkeypatch.setattr(ncp.training.run.Run, "_track", track)
        run_here("dpo", following(assets, folder, *extra, *more, decay="0"))

    run("whole", tmp_path / "whole")
    run("half", tmp_path / "half", "--max_train_steps", "2")
    run("half", tmp_path / "half", "--resume_from_checkpoint", "latest")
    losses = [figures["loss"] for _, figures in found["whole"] if "loss" in figures]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6)
    drift = {n: [f["heldout_winner_drift"] for _, f in found[n] if "heldout_winner_drift" in f] for n in found}
    assert len(drift["whole"]) == 4 and drift["half"] == drift["whole"] and max(map(abs, drift["whole"])) > 1e-4


def test_a_resumed_run_ends_with_the_same_bits(assets, tmp_path):
    extra = ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    run_here("dpo", following(assets, tmp_path / "whole", *extra))
    run_here("dpo", following(assets, tmp_path / "half", *extra, "--max_train_steps", "2"))
    run_here("dpo", following(assets, tmp_path / "half", *extra, "--resume_from_checkpoint", "latest"))
    assert_same_weights(tmp_path / "whole", tmp_path / "half")
    one, two = (saved_reference(tmp_path / name / "checkpoint-4") for name in ("whole", "half"))
    early = saved_reference(tmp_path / "half" / "checkpoint-2")
    assert all(map(torch.equal, one, two)) and not all(map(torch.equal, one, early))
    for decay in ("0.5", "null"):
        argv = following(assets, tmp_path / "half", *extra, "--resume_from_checkpoint", "latest", decay=decay)
        with pytest.raises(UserError, match=r"it has reference_decay 0.75 \(this run: "):
            run_here("dpo", argv)


def test_several_processes_keep_the_reference_of_one(assets, tmp_path):
    """Two of one pair each for one of two; with the other remedies beside it."""
    save_dataset(tmp_path / "data" / "train.parquet", share_0=[0.9, 0.3] * 6)
    extra = ["--max_train_steps", "3", "--use_8bit_adam", "false", "--adam_epsilon", "1e-3", "--soft_labels", "true"]
    extra += ["--winner_preserving_mu", "0.5", "--dataset_name", str(tmp_path / "data")]
    run_here("dpo", following(assets, tmp_path / "one", *extra))
    code = "import train_ncp_dpo\nfrom ncp.common.errors import run_program\nrun_program(train_ncp_dpo.main)"
    with ranks_of(code, following(assets, tmp_path / "two", *extra, "--train_batch_size", "1")) as ranks:
        said = [r.communicate(timeout=300) for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0], said
    one, two = (saved_reference(tmp_path / name / "checkpoint-3") for name in ("one", "two"))
    most = max(p.abs().max() for p in one[1::2])  # lora_B, which starts at 0
    assert most > 0
    assert all((p - q).abs().max() < 1e-3 * most for p, q in zip(one, two, strict=True))
