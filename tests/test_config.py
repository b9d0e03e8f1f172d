"""One parser for YAML and command line: same types, same ranges, one line for every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest
from runs import SCRIPTS

from ncp.common.config import option, parse, save_yaml
from ncp.common.errors import UserError, run_program

REQUIRED = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


@dataclasses.dataclass(kw_only=True)
class Small:
    name: str = option(group="first", doc="a required text")
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


@dataclasses.dataclass(kw_only=True)
class Larger(Small):
    extra: float | None = option(None, low=0, high=0.5, group="second", doc="50% is the most")
    last: list[str] = option(["x", "y"], choices=("x", "y"), doc="of two words")
    own: int = option(7, high=9, group="first", doc="joins a group")


def test_help_shows_each_key_in_its_group_with_type_range_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Larger, ["--help"], description="what it does")
    said = capsys.readouterr().out
    assert end.value.code == 0 and "what it does" in said
    heads = [line for line in said.splitlines() if re.match(r"\w.*:$", line)]
    assert heads == ["options:", "first:", "second:"]
    said = " ".join(said.split())
    for text in (
        "--name VALUE a required text (text; required)",
        "--rate VALUE a positive number (a number, more than 0; default: 1e-8)",
        "--count VALUE an integer in a range (an integer from 1 to 9; default: 3)",
        "--flag [VALUE] a switch (true or false; default: false)",
        "--mode VALUE one of two (one of: a, b; default: a)",
        "--limit VALUE may be empty (an integer, or null; default: null)",
        "--words VALUE several (list of text; default: [])",
        "--own VALUE joins a group (an integer, at most 9; default: 7) second: ",
        "--extra VALUE 50% is the most (a number from 0 to 0.5, or null; default: null)",
        "--last VALUE of two words (list of: x, y; default: [x, y])",
    ):
        assert text in said


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
