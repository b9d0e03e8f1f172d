"""One parser for YAML and command line: same types, same ranges, one line for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import filter_pickapic
import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from evaluation import protocol
from ncp.common.config import option, parse, save_yaml
from ncp.common.errors import UserError
from ncp.common.errors import run_program as run

ROOT = Path(__file__).parents[1]
SCRIPTS = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}
REQUIRED = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


@dataclasses.dataclass(kw_only=True)
class Small:
    name: str = option(doc="a required text")
    rate: float = option(1e-8, above=0, doc="a positive number")
    count: int = option(3, low=1, high=9, doc="an integer in a range")
    flag: bool = option(False, doc="a switch")
    mode: str = option("a", choices=("a", "b"), doc="one of two")
    limit: int | None = option(None, doc="may be empty")
    words: list[str] = option([], doc="several")


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("key", "yaml_text", "cli_text", "value"),
    [
        ("rate", "1e-8", "1e-8", 1e-8),  # a string to YAML 1.1
        ("rate", "2", "2", 2.0),
        ("count", "7", "7", 7),
        ("count", "1e0", "1e0", 1),
        ("flag", "false", "False", False),
        ("flag", "on", "yes", True),
        ("limit", "null", "none", None),
        ("limit", "5", "5", 5),
        *[
            ("words", text, text, value)
            for text, value in (
                ("[x, y z]", ["x", "y z"]),
                ("[]", []),
                ("portrait of an old fisherman, oil painting", ["portrait of an old fisherman, oil painting"]),
                ("[0, mid]", ["0", "mid"]),
                ("12", ["12"]),
                ("one # and a comment", ["one"]),
                ("""['odd: signs', "a, b", plain]""", ["odd: signs", "a, b", "plain"]),
                ('"[]"', ["[]"]),
                ('["x.json", "ä 😀.json"]', ["x.json", "ä 😀.json"]),  # JSON, as evaluate.py writes it for --votes
            )
        ],
        ("mode", "b", "b", "b"),
    ],
)
def test_yaml_and_command_line_agree(tmp_path, key, yaml_text, cli_text, value):
    from_yaml = parse(Small, ["--config", write(tmp_path, f"name: n\n{key}: {yaml_text}\n")])
    from_cli = parse(Small, ["--name", "n", f"--{key}", cli_text])
    for config in (from_yaml, from_cli):
        assert getattr(config, key) == value
        assert type(getattr(config, key)) is type(value)


def test_the_command_line_wins_and_a_bare_flag_is_true(tmp_path):
    config = parse(Small, ["--config", write(tmp_path, "name: n\ncount: 2\n"), "--count=4", "--flag"])
    assert (config.name, config.count, config.flag) == ("n", 4, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: n\ncuont: 3", "unknown key 'cuont'; did you mean count?"),
        ("count: 3", "'name' is missing"),
        ("name: n\ncount: three", "count is 'three'; expected an integer"),
        ("name: n\ncount: 2.5", "count is 2.5; expected an integer"),
        ("name: n\ncount: true", "count is True; expected an integer"),
        ("name: n\ncount: 10", "count is 10; expected at most 9"),
        ("name: n\ncount: 0", "count is 0; expected at least 1"),
        ("name: n\nrate: 0", "rate is 0.0; expected more than 0"),
        ("name: n\nrate: .nan", "rate is nan; expected a number"),
        ("name: n\nrate: .inf", "rate is inf; expected a number"),
        ("name: n\nflag: maybe", "flag is 'maybe'; expected true or false"),
        ("name: n\nflag: 2", "flag is 2; expected true or false"),
        ("name: on", "name is True; expected text (quote it"),
        ("name: n\nmode: c", "mode is 'c'; expected one of: a, b"),
        ("name: n\ncount:", "count is empty; expected an integer"),
        ("name: n\nname: m", "key 'name' is given twice"),
        ("- a\n- b", "expected lines of 'key: value', found a list"),
        ("name: [", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_each_mistake_is_one_line_that_names_its_place(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse(Small, ["--config", file])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nmae", "x"], "unknown argument --nmae; did you mean --name?"),
        (["--zzz"], "unknown argument --zzz; --help lists the known ones"),
        (["--name", "n", "--count", "x"], "--count is 'x'; expected an integer"),
        (["--name"], "expected one argument"),
        (["--config", "no/such.yaml"], "no/such.yaml: cannot read the config file"),
        (["stray"], "unknown argument stray"),
        (
            ["--name", "n", "--words", "odd: signs"],
            "--words is 'odd: signs', which YAML cannot read; a list is written [",
        ),
        (["--name", "n", "--words", "[x, y"], "--words is '[x, y', which YAML cannot read"),
        (["--name", "n", "--words", "x\nname: m"], "which YAML cannot read"),
        (["--name", "n", "--words", ""], "--words is empty; expected list of text"),
        (["--name", "n", "--words", "[[x], y]"], "--words is ['x']; expected text"),
    ],
)
def test_command_line_mistakes(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Small, argv)


def test_saved_config_reads_back(tmp_path):
    config = parse(Small, ["--name", "n: #", "--rate", "1e-8", "--words", "[a, 'b, #: c']"])
    save_yaml(config, tmp_path / "saved.yaml")
    assert parse(Small, ["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--timestep_offset", "0"], "timestep_offset is '0'"),
        (["--timestep_offset", "x1"], "timestep_offset is 'x1'"),
        (["--secant", "0.5"], "secant is '0.5'"),
        (["--secant", "fast"], "secant is 'fast'"),
        (["--encoder_blocks", "[last, last]"], "encoder_blocks is"),
        (["--encoder_blocks", "0,mid"], "encoder_blocks: '0,mid' is one item; several are written [0, mid]"),
        (
            ["--checkpointed_blocks", "up0, mid"],
            "checkpointed_blocks: 'up0, mid' is one item; several are written [up0",
        ),
        (["--lr_warmup_steps", "11", "--max_train_steps", "10"], "lr_warmup_steps (11) is more than max_train_steps"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_rules_across_keys(script, extra, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(SCRIPTS[script].Config, [*REQUIRED, *extra])


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_shipped_config_parses_and_comments_every_key(file):
    kind = file.stem.rpartition("_")[2]
    other = protocol.Config if file.stem.startswith("eval_") else filter_pickapic.FilterConfig
    cls = SCRIPTS[kind].Config if kind in SCRIPTS else other
    config = parse(cls, ["--config", str(file)])
    lines = file.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\w+:", line)]
    assert {lines[n].split(":")[0] for n in keys} == {f.name for f in dataclasses.fields(cls)}
    assert all("#" in lines[n] or lines[n - 1].startswith("#") for n in keys)  # beside the key or above it
    if kind in SCRIPTS and not file.stem.startswith("tiny"):
        arch, large, ncp = file.stem[:4], "_full_" in file.stem, "_ncp_" in file.stem
        batch = (config.resolution, config.train_batch_size, config.gradient_accumulation_steps)
        assert batch == {"sd15": (512, 64, 8), "sdxl": (1024, 8, 64)}[arch]
        assert (config.rank, config.scale_lr, config.use_8bit_adam) == (64, True, True)
        assert config.effective_batch_size == 2048  # a single GPU does not train at a quarter of it unnoticed
        assert config.space == ("perceptual" if ncp else "latent")
        # The paper: 7.5% (SD 1.5) and 2% (SDXL) of Diffusion-DPO's 2000 x 2048 pairs, at three times its learning rate.
        steps = {"sd15": (1000, 150), "sdxl": (2000, 40)}[arch][0 if large else 1]
        assert (config.max_train_steps, config.learning_rate) == (steps, 1e-8 if large else 3e-8)
        assert large or steps / 2000 == {"sd15": 0.075, "sdxl": 0.02}[arch]
        assert large or 10 <= steps // config.checkpointing_steps <= 14  # a dozen points to look at
        if kind == "dpo":
            assert config.beta == 2500


@pytest.mark.parametrize(
    ("key", "value", "several"),
    [
        ("models", "base,lam=LORA", "[base, lam=LORA]"),
        ("models", "a=x, b=y", "[a=x, b=y]"),
        ("runs", "a=x,b=y", "[a=x, b=y]"),
        ("scorers", "clip,aesthetic", "[clip, aesthetic]"),
    ],
)
def test_models_in_a_row_without_brackets_are_told_how_to_be_written(tmp_path, key, value, several):
    argv = ["--config", str(ROOT / "configs/eval_tiny.yaml")]
    with pytest.raises(UserError, match=re.escape(f"{key}: '{value}' is one item; several are written {several}")):
        parse(protocol.Config, [*argv, f"--{key}", value])
    (tmp_path / "odd, name").mkdir()  # a comma in a path is none of a list
    assert parse(protocol.Config, [*argv, "--models", f"a={tmp_path}/odd, name"]).models == [f"a={tmp_path}/odd, name"]


@pytest.mark.parametrize("name", ["pickapic_validation", "partiprompts", "hpdv2"])
def test_published_evaluation_settings(name):
    config = parse(protocol.Config, ["--config", str(ROOT / f"configs/eval_{name}.yaml")])
    xl = "xl" in config.pretrained_model_name_or_path
    assert (config.guidance_scale, config.resolution) == ((5.0, 1024) if xl else (7.5, 512))
    assert (config.num_inference_steps, config.scheduler, config.samples_per_prompt) == (50, "pipeline", 1)


def test_the_promised_configs_are_there():
    names = {f"sd15_{n}{m}" for n in ("", "ncp_") for m in SCRIPTS} | {f"sdxl_ncp_{m}" for m in SCRIPTS} | {"sdxl_dpo"}
    names |= {f"{arch}_full_{m}" for arch in ("sd15", "sdxl") for m in ("dpo", "ncp_dpo")}
    names |= {f"eval_{n}" for n in ("tiny", "pickapic_validation", "partiprompts", "hpdv2")}
    assert names <= {f.stem for f in CONFIGS}
    for name in ("single_gpu", "multi_gpu", "multi_node", "cpu"):
        content = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text())
        assert content["num_processes"] >= 1 and "distributed_type" in content


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_key_is_read_somewhere(script):
    source = "".join(p.read_text() for p in [*ROOT.glob("ncp/*.py"), ROOT / f"train_ncp_{script}.py"])
    for field in dataclasses.fields(SCRIPTS[script].Config):
        assert re.search(rf"(config|self)\.{field.name}\b", source), f"{field.name} is never read"


def test_every_key_of_the_evaluation_is_read_somewhere():
    source = "".join(p.read_text() for p in ROOT.glob("evaluation/*.py"))
    for field in dataclasses.fields(protocol.Config):
        assert re.search(rf"(config|self)\.{field.name}\b", source), f"{field.name} is never read"


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
