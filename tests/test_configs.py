"""The files in configs/, the page that describes their keys, and that each key is there to be read."""

import ast
import dataclasses
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from runs import SCRIPTS

import cache_latents
from ncp.common.config import grouped, parse
from ncp.common.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# Keys that a file may give their default: what is looked for first in a run, and what the published settings are about.
DEFINING = {
    "train": {"resolution", "space", "beta", "lam", "max_train_steps", "learning_rate"},
    "filter": {"rule", "min_wins", "pairs_per_winner", "best_image_uid"},
    "evaluate": {"scheduler", "num_inference_steps", "guidance_scale", "resolution"},
}
MOST_KEYS, MOST_LINES = 24, 50


def load_page():
    """docs/configuration.py as a module."""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load_page()
PROGRAMS = {program: page.find(place) for program, (place, _) in page.PROGRAMS.items()}


def program_of(file: Path) -> str:
    """The program that a file in configs/ is for, by its name."""
    if file.stem.startswith("eval_"):
        return "evaluate.py"
    kind = file.stem.rpartition("_")[2]
    return f"train_ncp_{kind}.py" if kind in SCRIPTS else "filter_pickapic.py"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_config_holds_what_defines_its_run(file):
    program = program_of(file)
    cls, lines = PROGRAMS[program], file.read_text().splitlines()
    parse(cls, ["--config", str(file)])
    fields = [f for members in grouped(cls).values() for f in members]
    given = list(yaml.safe_load(file.read_text()))
    assert given == [f.name for f in fields if f.name in given], "not in the order of docs/configuration.md"
    assert len(given) <= MOST_KEYS and len(lines) <= MOST_LINES
    for field in fields:
        if field.name in given and field.name not in DEFINING[program.split("_")[0].removesuffix(".py")]:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = getattr(parse(cls, ["--config", str(file)]), field.name)
            assert value != default, f"{field.name}: {value} is the default: leave it out"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_config_says_what_it_is_how_to_run_it_and_what_each_key_is_for(file):
    lines = file.read_text().splitlines()
    head = "\n".join(lines[: lines.index("")])
    assert all(line.startswith("# ") for line in head.splitlines())
    assert re.search(
        rf"^#   (python|accelerate launch) .*{program_of(file)} .*--config configs/{file.name}", head, re.M
    )
    keys = [number for number, line in enumerate(lines) if re.match(r"\w+:", line)]
    assert [lines[n] for n in keys if "  # " not in lines[n] and not lines[n - 1].startswith("# ")] == []


@pytest.mark.parametrize("file", [f for f in CONFIGS if f.name.startswith("sd")], ids=lambda f: f.stem)
def test_published_training_settings(file):
    kind = file.stem.rpartition("_")[2]
    config = parse(SCRIPTS[kind].Config, ["--config", str(file)])
    arch, large, ncp = file.stem[:4], "_full_" in file.stem, "_ncp_" in file.stem
    batch = (config.resolution, config.train_batch_size, config.gradient_accumulation_steps)
    assert batch == {"sd15": (512, 64, 8), "sdxl": (1024, 8, 64), "sd35": (1024, 8, 64)}[arch]
    assert (config.rank, config.lora_alpha, config.scale_lr, config.use_8bit_adam) == (64, None, True, True)
    adam = (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.adam_weight_decay, config.max_grad_norm)
    assert adam == (0.9, 0.999, 1e-8, 1e-2, 1.0)
    assert config.proportion_empty_prompts == 0
    assert config.effective_batch_size == 2048  # a single GPU does not train at a quarter of it unnoticed
    assert config.space == ("perceptual" if ncp else "latent")
    # SD 3.5 follows SDXL.
    # The paper: 7.5% (SD 1.5) and 2% (SDXL) of Diffusion-DPO's 2000 x 2048 pairs, at three times its learning rate.
    steps = {"sd15": (1000, 150), "sdxl": (2000, 40), "sd35": (2000, 40)}[arch][0 if large else 1]
    assert (config.max_train_steps, config.learning_rate) == (steps, 1e-8 if large else 3e-8)
    assert large or steps / 2000 == {"sd15": 0.075, "sdxl": 0.02, "sd35": 0.02}[arch]
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
        parse(PROGRAMS["evaluate.py"], [*argv, f"--{key}", value])
    (tmp_path / "odd, name").mkdir()  # a comma in a path is none of a list
    assert parse(PROGRAMS["evaluate.py"], [*argv, "--models", f"a={tmp_path}/odd, name"]).models == [
        f"a={tmp_path}/odd, name"
    ]


@pytest.mark.parametrize("name", ["pickapic_validation", "partiprompts", "hpdv2"])
def test_published_evaluation_settings(name):
    config = parse(PROGRAMS["evaluate.py"], ["--config", str(ROOT / f"configs/eval_{name}.yaml")])
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


def test_the_cache_takes_the_keys_of_every_training_script():
    keys = {f.name for script in SCRIPTS.values() for f in dataclasses.fields(script.Config)}
    assert {f.name for f in dataclasses.fields(cache_latents.Config)} == keys
    for file in CONFIGS:
        if program_of(file).startswith("train_"):
            parse(cache_latents.Config, ["--config", str(file)])


# ---------------------------------------------------------------- the page


def test_the_page_is_what_the_dataclasses_say():
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == page.page(), f"docs/configuration.md is not up to date; run: {page.COMMAND}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_is_on_the_page(program):
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(PROGRAMS[program]):
        assert f"| `{field.name}` | " in text


# ---------------------------------------------------------------- every key is read


def modules_of(program: str) -> set[Path]:
    """The program and every module of this repository that it imports, at whatever depth."""
    found: set[Path] = set()
    open_ = [ROOT / program]
    while open_:
        file = open_.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
            open_ += [path for path in paths if path.is_file()]
    return found


@cache
def keys_read(program: str) -> set[str]:
    """Attributes that the program's modules read of a configuration.

    That is called config, self.config or run.config, or is the self of a configuration class, whose `check` does not
    count: a key that is only checked changes nothing.
    """
    read: set[str] = set()
    for file in modules_of(program):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "check"]
                read |= {a for m in methods for a, of in attributes(m) if of == "self"}
        read |= {a for a, of in attributes(tree) if of in ("config", "self.config", "run.config")}
    return read


def attributes(tree: ast.AST) -> list[tuple[str, str]]:
    """(attribute, what it is read of) for each attribute that is read in the code, by its name or by getattr."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
    named = [(n.args[1].value, ast.unparse(n.args[0])) for n in calls if isinstance(n.args[1], ast.Constant)]
    return [*((n.attr, ast.unparse(n.value)) for n in nodes), *named]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_is_read_by_the_program(program):
    unread = {f.name for f in dataclasses.fields(PROGRAMS[program])} - keys_read(program)
    assert not unread, f"{program} never reads {', '.join(sorted(unread))}"
