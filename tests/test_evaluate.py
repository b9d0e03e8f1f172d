"""evaluate.py: its steps, their order, and its settings."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import evaluations
import pytest
from evaluations import arguments, configured, recording, refused
from support import ROOT, python

import evaluate
from evaluate import compare
from evaluation.generate import generate
from evaluation.protocol import WEIGHT_KEYS, EvaluationConfig
from evaluation.score import score
from ncp.common.config import parse
from ncp.common.errors import UserError

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--models", "lora"], "models: 'lora'; expected base or NAME=PATH"),
        (["--models", "a b=x"], "models: 'a b=x'"),
        (["--models", "a="], "models: 'a='"),
        (["--runs", "base"], "runs: 'base'; expected NAME=PATH"),
        (["--models", "[base, x=1, x=2]"], "the name 'x' is given twice"),
        (["--models", "[]"], "models is empty"),
        (["--scorers", "[]"], "scorers is empty"),
        (["--resolution", "65"], "resolution is 65"),
    ],
)
def test_the_config_refuses(assets, extra, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configured(assets, Path("o"), *extra)


@pytest.mark.parametrize("step", [generate, score, compare])
def test_another_protocol_is_refused_and_named(assets, out, step):
    before = sorted(p.name for p in out.rglob("*"))
    said = refused(step, assets, out, "--guidance_scale", "5", "--seed", "1")
    assert "drawn with another protocol (seed 0, now 1; guidance_scale 3.0, now 5.0)" in said
    assert sorted(p.name for p in out.rglob("*")) == before


def test_steps_out_of_order_say_which_comes_first(assets, tmp_path, out):
    for step in (score, compare):
        assert "run evaluate.py generate first" in refused(step, assets, tmp_path / "new")
    (out / "scores.parquet").unlink()
    assert "run evaluate.py score first" in refused(compare, assets, out)
    (out / "index.parquet").unlink()
    assert "run evaluate.py generate first" in refused(score, assets, out)


def test_missing_images_and_models_are_named(assets, out):
    assert "no images of other in" in refused(compare, assets, out, "--models", f"[base, other={assets / 'lora'}]")
    for step in (score, compare):
        said = refused(step, assets, out, "--models", f"[base, tuned={assets / 'bare-unet'}]")
        assert f"the images of 'tuned' are by {assets / 'lora'}, not by {assets / 'bare-unet'}" in said
    file = next((out / "images" / "tuned").glob("*.png"))
    file.unlink()
    for step in (score, compare):
        said = refused(step, assets, out)
        assert f"1 of 12 images are missing, such as images/tuned/{file.name}" in said and "generate again" in said


def test_the_command_line(assets, tmp_path, monkeypatch, capsys):
    assert evaluate.join_lists(["--a", "b", "--votes", "x", "y", "--c"]) == ["--a", "b", "--votes", '["x", "y"]', "--c"]
    assert evaluate.join_lists(["--votes"]) == ["--votes"] and evaluate.join_lists(["--a"]) == ["--a"]
    argv = arguments(assets, tmp_path / "o", "--models", "x=some/one")
    hub = python(ROOT / "evaluate.py", "generate", *argv, HF_HUB_OFFLINE="1")
    assert hub.returncode == 2 and hub.stderr.startswith(
        "error: model 'x': some/one is no local folder; the hub gave no"
    )
    assert hub.stderr.count("\n") == 1
    with pytest.raises(UserError, match="'judge'; expected one of: generate, score, compare, annotate, count"):
        evaluate.main(["judge"])
    for argv in (["--help"], []):
        evaluate.main(argv)
        assert "evaluate.py annotate" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "nonsense"])
    with pytest.raises(UserError, match="'nonsense'"):
        evaluate.main()


def test_annotate_is_a_step_and_no_key(assets, tmp_path):
    argv = arguments(assets, tmp_path / "o")
    for given in (["--annotate"], ["--annotate", "true"], ["--annotate=false"]):
        with pytest.raises(UserError) as error:
            evaluate.main(["compare", *argv, *given])
        assert str(error.value) == (
            "command line: --annotate is no key; remove it, and for the judges' page run: "
            "evaluate.py annotate --config ..."
        )
    old = tmp_path / "old.yaml"
    for value in ("true", "false"):
        old.write_text(f"annotate: {value}\nannotate_prompts: 3\n")
        for step in evaluate.STEPS:
            with pytest.raises(UserError, match=r"old.yaml: 'annotate' is no key; .* run: evaluate.py annotate"):
                evaluate.main([step, "--config", str(old), *argv])
    assert not (tmp_path / "o").exists()


def test_a_count_needs_votes(assets, tmp_path):
    with pytest.raises(UserError, match=r"count: no votes; expected --votes A.json B.json"):
        evaluate.main(["count", *arguments(assets, tmp_path / "o")])
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------- every key


def test_every_key_is_read_by_a_step(assets, tmp_path):
    """In a run of all steps. That the values then make a difference is for the tests of the steps; the keys that say
    where the weights of published judges are, for test_a_judge_reads_its_own_keys.
    """
    read: set[str] = set()
    (tmp_path / "prompts").mkdir()
    shutil.copy(assets / "prompts.txt", tmp_path / "prompts")
    extra = ["--prompts", str(tmp_path / "prompts"), "--runs", f"run={assets / 'run'}", "--max_prompts", "2"]
    votes = tmp_path / "votes.json"

    def config(*more: str) -> EvaluationConfig:
        return parse(recording(read), arguments(assets, tmp_path / "out", *extra, *more))

    for step in ("generate", "score", "compare", "annotate"):
        evaluate.STEPS[step](config())
    key = json.loads((tmp_path / "out" / "annotation" / "key.json").read_text())
    ballot = {"page": key["page"], "annotator": "ann", "votes": [{"overall": "left"}] * 2}
    votes.write_text(json.dumps(ballot))
    evaluate.count(config("--votes", str(votes)))
    keys = {f.name for f in dataclasses.fields(EvaluationConfig)}
    # Each judge's own are read by that judge: tests/test_scorers.py, test_judges.py and test_endpoint.py.
    endpoint_keys = {"endpoints", "vlm_question", "endpoint_timeout", "endpoint_attempts"}
    assert keys - read == {key for keys in WEIGHT_KEYS.values() for key in keys} | endpoint_keys


def test_intervals_are_of_the_configured_number_of_resamples(assets, out, monkeypatch):
    asked = []
    for function in ("compare_all", "curves"):
        monkeypatch.setattr(f"evaluation.compare.{function}", lambda *given: asked.append(given[-1]) or [])
    compare(configured(assets, out, "--bootstrap_samples", "123"))
    assert asked == [123, 123]
