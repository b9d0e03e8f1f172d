"""Bad input of every kind: never a traceback, a hang, a silent use, or a file outside the output folder."""

import ast
import io
import random
import zlib

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pipelines import jpeg, save_dataset
from runs import SCRIPTS, arguments, refusal, run_here, weights
from support import ROOT

import ncp.training.run
from ncp.common.config import _UniqueKeyLoader, parse
from ncp.common.errors import DIVERGED, Stopped, UserError
from ncp.training.checkpoints import fault
from ncp.training.images import Unreadable, decode_image, resize_crop_flip
from ncp.training.weights import WEIGHTS

TOKEN = "hf_" + "a1B2" * 9
ROOMS = ("ncp", "preparing", "filtering", "evaluation", "tiny", "benchmarks", "study", "docs")


class Loaded(BaseException):
    """All checks that come before a model loads have passed."""


def start(kind: str, argv: list[str], monkeypatch, capsys) -> str:
    """What the script says if it refuses, "" if it would load a model; whatever else it does fails the test."""

    def loaded(*_):
        raise Loaded

    monkeypatch.setattr(ncp.training.run, "load_models", loaded)
    try:
        said = refusal(SCRIPTS[kind].main, argv, capsys)
    except Loaded:
        return ""
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 20_000, said
    return said


# ---------------------------------------------------------------- configs

NASTY = [
    None, True, False, 0, -1, 1, 2, 7, 10**30, 10**400, -0.5, 0.5, 1e-300, 1e300, float("inf"), float("nan"),
    "", " ", "null", "true", "1", "²", "٣", "1e400", "x" * 5000, "\0", "a\nb", "../../x", "/dev/null", "~", "☃🎨",
    "%s{0}", TOKEN, [], [[]], {}, {"a": 1}, ["mid"], ["last", "last"], [1, None], "latest", "auto", "latent", "x0",
    "skip", "fp16", "bf16", "none", "wandb",
]  # fmt: skip


def test_random_configs_are_refused_in_one_line_or_start(assets, tmp_path, monkeypatch, capsys):
    chance, outcomes = random.Random(0), {"refused": 0, "started": 0}
    keys = [f for f in SCRIPTS["cpo"].Config.__dataclass_fields__]
    base = arguments(assets, tmp_path / "out")
    here = tmp_path / "cwd" / "a" / "b"  # where output_dir: fp16 or ../../x ends up
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for number in range(150):
        argv = base[: len(base) - 2 * (number % 3)]
        content = {chance.choice(keys): chance.choice(NASTY) for _ in range(chance.randint(1, 2))}
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        shown = [a for pair in zip(argv[::2], argv[1::2], strict=True) if pair[0][2:] not in content for a in pair]
        said = start("cpo", ["--config", str(file), *shown], monkeypatch, capsys)
        outcomes["refused" if said else "started"] += 1
        assert TOKEN not in said
        assert {p.name for p in tmp_path.iterdir()} <= {"c.yaml", "out", "cwd"}, content
        for left in (tmp_path / "out").rglob("*"):
            assert left.name in ("config.yaml", "environment.yaml", ".writer.lock"), content
            assert TOKEN not in left.read_text(), content
            left.unlink()
    assert min(outcomes.values()) > 8, outcomes


@pytest.mark.parametrize(
    "text",
    ["? [a, b]\n: 1", "[" * 3000, "seed: 2020-99-99", "seed: !!binary x", "&a [*a]", "\x00", "\xff", "a: b: c", "{",
     "seed: &a [&b [*a, *a], *b]", "<<: 3", "!!python/name:os.system ''", "seed: !!set {a}", "1: 2", "null: 1"],
)  # fmt: skip
def test_strange_yaml_is_refused_in_one_line(assets, tmp_path, monkeypatch, capsys, text):
    (tmp_path / "c.yaml").write_bytes(text.encode("latin-1"))
    argv = ["--config", str(tmp_path / "c.yaml"), *arguments(assets, tmp_path / "out")]
    assert "c.yaml" in start("dpo", argv, monkeypatch, capsys)


def test_a_few_bytes_of_yaml_do_not_become_a_message_of_gigabytes(assets, tmp_path, monkeypatch, capsys):
    bomb = "seed:\n- &a0 [x, x]\n" + "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    (tmp_path / "c.yaml").write_text(bomb)
    argv = ["--config", str(tmp_path / "c.yaml"), *arguments(assets, tmp_path / "out")]
    assert "seed is [" in start("dpo", argv, monkeypatch, capsys)


TOO_LARGE = [["--learning_rate", "1e6"], ["--beta", "1e300"], ["--lora_alpha", "1e300"], ["--adam_weight_decay", "1e6"]]
TOO_SMALL = [["--learning_rate", "1e-300"], ["--beta", "1e-300"], ["--adam_epsilon", "1e6"], ["--lora_alpha", "1e-300"]]


@pytest.mark.parametrize("extra", TOO_LARGE, ids=lambda e: e[0])
def test_numbers_that_are_too_large_end_with_a_line_and_finite_weights(assets, tmp_path, extra):
    out = tmp_path / "out"
    argv = arguments(assets, out, *extra, "--max_train_steps", "6", "--max_skipped_steps", "2")
    with pytest.raises(Stopped, match=r"^stopped at step \d: 2 steps in a row .* not finite; [^\n]*$") as stop:
        run_here("dpo", argv)
    assert stop.value.status == DIVERGED and not (out / WEIGHTS).exists()
    (checkpoint,) = out.glob("checkpoint-*")
    assert fault(checkpoint) is None and all(v.isfinite().all() for v in weights(checkpoint).values())
    assert len((out / "skipped_steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("extra", TOO_SMALL, ids=lambda e: e[0])
def test_numbers_that_are_too_small_end_with_a_finite_result(assets, tmp_path, extra):
    run_here("dpo", arguments(assets, tmp_path / "out", *extra))
    found = weights(tmp_path / "out")
    assert found and all(v.isfinite().all() for v in found.values())
    assert not (tmp_path / "out" / "skipped_steps.jsonl").exists()


@pytest.mark.parametrize("key", ["tracker_project_name", "hub_model_id"])
@pytest.mark.parametrize("value", ["../../x", "/tmp/x", "..", "a/../b", "a\\b"])
def test_names_are_not_paths(assets, tmp_path, monkeypatch, capsys, key, value):
    assert key in start("sft", [*arguments(assets, tmp_path / "out"), f"--{key}={value}"], monkeypatch, capsys)


def test_a_token_is_neither_accepted_nor_repeated(assets, tmp_path, monkeypatch, capsys):
    for extra in (["--hub_model_id", TOKEN], ["--dataset_name", f"https://user:{TOKEN}@hf.co/x"], [TOKEN]):
        said = start("sft", [*arguments(assets, tmp_path / "out"), *extra], monkeypatch, capsys)
        assert TOKEN not in said
    assert "hf auth login" in start(
        "sft", [*arguments(assets, tmp_path / "out"), "--hub_model_id", TOKEN], monkeypatch, capsys
    )


def test_a_token_in_the_environment_is_written_nowhere(assets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    argv = arguments(assets, tmp_path / "out", "--report_to", "tensorboard")
    run_here("sft", argv)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 5 and all(TOKEN.encode() not in p.read_bytes() for p in files)


CODE_RUNNERS = {"eval", "exec", "compile", "__import__"}
CODE_LIBRARIES = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "runpy"}
MADE_SAFE = {"torch.load": "weights_only=True", "yaml.load": "_UniqueKeyLoader"}  # the second is a SafeLoader
UNSAFE = {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "pd.read_pickle"}


def what_runs_code(source: str) -> list[str]:
    """What in Python source may run code from a file or from the hub."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
        match node:
            case ast.keyword(arg="trust_remote_code" | "allow_pickle" | "custom_pipeline" as name):
                found.append(name)
            case ast.ImportFrom(module=name) if name and name.partition(".")[0] in CODE_LIBRARIES:
                found.append(text)
            case ast.ImportFrom(module="torch" | "yaml", names=names):
                found += [text] if any("load" in each.name for each in names) else []
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in CODE_LIBRARIES:
                found += [text] if name != "UnpicklingError" else []
            case ast.Call(func=ast.Name(id=name)) if name in CODE_RUNNERS:
                found.append(text)
            case ast.Call(func=ast.Attribute() as function):
                name = ast.unparse(function)
                found += [text] if name in UNSAFE or MADE_SAFE.get(name, "") not in text else []
    return found


@pytest.mark.parametrize(
    "line",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "pickle.loads(b)", "yaml.load(f, Loader)",
     "yaml.unsafe_load(f)", "eval(text)", "exec(text)", "AutoModel.from_pretrained(n, trust_remote_code=True)",
     "np.load(f, allow_pickle=True)", "joblib.load(p)", "from pickle import load", "runpy.run_path(p)",
     "from torch import load", "from yaml import unsafe_load as load"],
)  # fmt: skip
def test_what_would_run_code_is_found(line):
    assert what_runs_code(line)


def test_nothing_loads_code_or_pickles():
    files = [*ROOT.glob("*.py"), *(f for room in ROOMS for f in (ROOT / room).rglob("*.py"))]
    assert len(files) > 50
    found = {f.name: calls for f in files if (calls := what_runs_code(f.read_text(encoding="utf-8")))}
    inert = found.pop("pickled.py")  # which makes shells of all classes: test_judges.py
    assert "pickle_module=inert" in inert[-1] or any("pickle_module=inert" in call for call in inert)
    assert found == {"install.py": ["runpy.run_module"]}  # which starts pip
    assert issubclass(_UniqueKeyLoader, yaml.SafeLoader)


# ---------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A few bytes that say they are a very large picture."""
    small = bytearray(encoded(Image.new("L", (1, 1))))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


GOOD = {
    "1x1": (encoded(Image.new("RGB", (1, 1), "red")), (255, 0, 0)),
    "20,000 x 10": (encoded(Image.new("RGB", (20_000, 10), "red"), "JPEG"), (254, 0, 0)),
    "10 x 20,000": (encoded(Image.new("RGB", (10, 20_000), "red")), (255, 0, 0)),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
    "alpha": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
    "half alpha": (encoded(Image.new("LA", (8, 8), (0, 128))), (127, 127, 127)),
    "palette with transparency": (encoded(Image.new("P", (8, 8)), transparency=0), (255, 255, 255)),
    "16 bit": (encoded(Image.fromarray(np.full((8, 8), 0x8040, np.uint16))), (128, 128, 128)),
    "one bit": (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "WebP": (encoded(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True), (255, 0, 0)),
}


@pytest.mark.parametrize("case", GOOD)
def test_unusual_images_mean_what_they_show(case):
    content, colour = GOOD[case]
    crop = resize_crop_flip(decode_image(content), 32, np.array([0.5, 0.5]), True)
    assert crop.pixels.shape == (32, 32, 3)
    assert np.abs(crop.pixels.astype(int) - colour).max() <= 2


BAD = {
    "no bytes": b"",
    "null": None,
    "text": b"not an image",
    "truncated JPEG": jpeg(0)[:300],
    "JPEG header only": jpeg(0)[:20],
    "truncated PNG": encoded(Image.new("RGB", (64, 64)))[:-30],
    "a bomb": png_claiming(60_000, 60_000),
    "a smaller bomb": png_claiming(12_000, 10_000),
    "no pixels": png_claiming(0, 10),
    "a format that runs programs": encoded(Image.new("RGB", (8, 8)), "EPS"),
    "TIFF": encoded(Image.new("F", (8, 8)), "TIFF"),
    "damaged EXIF": encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")[:60],
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_picture_is_unreadable(case):
    with pytest.raises(Unreadable) as error:
        decode_image(BAD[case])
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_damaged_bytes_are_a_picture_or_unreadable():
    chance, outcomes = random.Random(0), [0, 0]
    originals = [jpeg(1), encoded(Image.new("RGBA", (30, 20))), encoded(Image.new("RGB", (30, 20)), "WEBP")]
    for number in range(600):
        content = bytearray(originals[number % 3])
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        try:
            image = decode_image(bytes(content))
            assert image.mode == "RGB"
            outcomes[0] += 1
        except Unreadable:
            outcomes[1] += 1
    assert min(outcomes) > 50, outcomes


# ---------------------------------------------------------------- rows


def test_rows_of_every_kind_are_trained_counted_or_named(assets, tmp_path, capsys):
    captions = [
        "x " * 5000,
        "",
        None,
        "🎨 ☃ émoji",
        "a\nb\tc",
        "../../x",
        "\u202e",
        "%s {0}",
        "plain",
        " ",
        "y" * 200,
        "z",
    ]
    images = [good for good, _ in GOOD.values()] + [BAD["truncated JPEG"], None]
    uids = ["../../evil", "/etc/passwd", *[f"a{i}" for i in range(10)]]
    folder = save_dataset(tmp_path / "d" / "t.parquet", caption=captions, jpg_0=images, image_0_uid=uids).parent
    extra = ["--dataset_name", str(folder), "--max_train_steps", "12", "--corrupt_images", "skip"]
    run_here("dpo", arguments(assets, tmp_path / "out", *extra, "--logging_steps", "12"))
    said = capsys.readouterr()
    assert "9 decisive pairs of 12 rows" in said.out and "3 without a caption" in said.out  # one is a space
    assert "9 distinct; 2 of them longer than 77 tokens" in said.out
    assert {p.name for p in tmp_path.iterdir()} == {"d", "out"}
    with pytest.raises(UserError, match=r"t\.parquet row 1[01], jpg_0, uid a[89]: unreadable image"):
        run_here("dpo", arguments(assets, tmp_path / "out2", *extra[:4]))


COLUMNS = {
    "captions are numbers": ({"caption": list(range(12))}, "column caption is int64; expected text"),
    "labels are text": ({"label_0": ["1"] * 12}, "column label_0 is string; expected number"),
    "uids are numbers": ({"image_1_uid": list(range(12))}, "column image_1_uid is int64; expected text"),
    "images are lists": ({"jpg_0": [[1]] * 12}, "column jpg_0 is list<element: int64>; expected binary"),
    "no label at all": ({"label_0": pa.nulls(12)}, "column label_0 is null; expected number"),
    "labels that mean nothing": (
        {"label_0": [float("inf"), float("nan"), -1, 2, None, 1e300] * 2},
        "not a single decisive pair among 12 rows",
    ),
    "captions that are no UTF-8": (
        {"caption": pa.Array.from_buffers(pa.string(), 12, [None, pa.py_buffer(np.arange(13, dtype=np.int32).tobytes()),
                                                             pa.py_buffer(b"\xff" * 12)])},
        "is not valid UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_another_kind_are_named(assets, tmp_path, monkeypatch, capsys, case):
    columns, message = COLUMNS[case]
    file = save_dataset(tmp_path / "d.parquet", **columns)
    said = start("dpo", arguments(assets, tmp_path / "out", "--dataset_name", str(file)), monkeypatch, capsys)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_counted_to_the_token(assets, tmp_path, capsys):
    # One byte is one token of this tokenizer; two of the 77 frame the prompt.
    captions = ["a" * 75, "a" * 76, "é" * 37, "é" * 38, *["short"] * 8]
    file = save_dataset(tmp_path / "d.parquet", caption=captions)
    run_here("sft", arguments(assets, tmp_path / "out", "--dataset_name", str(file)))
    said = capsys.readouterr()
    assert "5 distinct; 2 of them longer than 77 tokens" in said.out and "truncated" not in said.err
    assert parse(SCRIPTS["sft"].Config, ["--config", str(tmp_path / "out" / "config.yaml")]).dataset_name == str(file)
