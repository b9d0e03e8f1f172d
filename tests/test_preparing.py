"""Other preference datasets, in their own columns, become Pick-a-Pic's; what cannot be used is said and counted."""

import json
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filter_data import filtered
from pipelines import SIDE, save_pipeline
from preference_sets import PROMPTS, SETS, hpdv2, picture, prepared, save_chosen_rejected
from runs import call
from support import python, started, wait_for

import prepare_preferences
import train_ncp_dpo
from filtering.settings import DECISION, IMAGES
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.files import temporary_for
from preparing.formats import hpdv3, imagereward, moment, rapidata, share_of, table
from preparing.settings import FORMATS, QUESTIONS, PrepareConfig
from preparing.source import json_rows
from preparing.write import first_label, is_image, uid_of


def config(form: str, **changes: object) -> PrepareConfig:
    made = PrepareConfig(format=form, dataset_name="in", output_dir="out", **changes)
    made.check()
    return made


def labels(rows: list[dict]) -> list[float]:
    assert all(r["label_0"] + r["label_1"] == 1 for r in rows)
    return [r["label_0"] for r in rows]


# ---------------------------------------------------------------- each set: convert, filter, train


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_converted_filtered_and_trained_on(pipeline, tmp_path, capsys, name):
    (tmp_path / "in").mkdir()
    rows, manifest = prepared(SETS[name](tmp_path / "in"), tmp_path / "prepared")
    counts = manifest["counts"]
    assert len(rows) == counts["decisive"] + counts["ties"] == counts["pairs"] - sum(counts["dropped"].values())
    for file in (tmp_path / "prepared").glob("*.parquet"):
        assert {*DECISION, *IMAGES} <= set(pq.read_schema(file).names)
    kept = filtered(tmp_path / "prepared", tmp_path / "filtered", "--rule", "no_ties")
    assert kept["rows"]["input"] == len(rows) and kept["pairs"]["total"] == counts["decisive"]
    assert kept["rows"]["dropped"]["tie"] == counts["ties"]
    for folder in ("prepared", "filtered"):  # the trainers read both
        train(pipeline, tmp_path / folder, tmp_path / f"{folder}-lora")
    assert "copy:" not in capsys.readouterr().out  # nothing is copied: both write small row groups


def train(pipeline, data, out, *extra: object) -> None:
    """Two steps of NCP-DPO."""
    settings = {
        "pretrained_model_name_or_path": pipeline, "dataset_name": data, "output_dir": out, "resolution": SIDE,
        "cache_dir": out.parent / "arrow", "mixed_precision": "no", "max_train_steps": 2, "train_batch_size": 2,
        "rank": 4, "use_8bit_adam": "false", "report_to": "none", "dataloader_num_workers": 0,
    }  # fmt: skip
    call(train_ncp_dpo.main, [*(str(a) for k, v in settings.items() for a in (f"--{k}", v)), *map(str, extra)])
    assert (out / "pytorch_lora_weights.safetensors").is_file()


def test_the_filter_finds_the_absolute_winners_of_hpdv2(tmp_path):
    """Per prompt k0 beats k1 twice and k2 once: it is one image, known by its bytes, whichever side it stands on."""
    prepared(hpdv2(tmp_path), tmp_path / "out")
    manifest = filtered(tmp_path / "out", tmp_path / "filtered")
    assert manifest["pairs"]["total"] == 6  # the latest of each winner: over k2
    (row, *_) = pq.read_table(tmp_path / "filtered/data").to_pylist()
    assert row["best_image_uid"] == uid_of(picture(0)) and row["ranking_id"] == 2 and row["jpg_0"] == picture(2)


# ---------------------------------------------------------------- what the columns become


def test_hpdv2(tmp_path):
    rows, _ = prepared(hpdv2(tmp_path), tmp_path / "out")
    assert labels(rows) == [1, 0, 0] * 6 and [r["ranking_id"] for r in rows] == list(range(18))
    assert [r["caption"] for r in rows[::3]] == PROMPTS and {r["share_0"] for r in rows} == {None}
    first, second = picture(0), picture(1)  # bytes are copied
    assert (rows[0]["jpg_0"], rows[0]["jpg_1"], rows[1]["jpg_0"], rows[1]["jpg_1"]) == (first, second, second, first)
    assert {r["created_at"].to_pydatetime() for r in rows} == {datetime(1970, 1, 1)}
    assert rows[1]["best_image_uid"] == rows[1]["image_1_uid"] == rows[0]["image_0_uid"] == uid_of(first)


@pytest.mark.parametrize(("min_share", "expected"), [(0.5, [1, 1, 0.5, 1, 1, 1]), (0.7, [0.5, 1, 0.5, 1, 1, 1])])
def test_hpdv3(tmp_path, min_share, expected):
    """12 of 19 votes are 0.63, 16 of 19 0.84; without votes path1 is better."""
    rows, _ = prepared(SETS["hpdv3"](tmp_path), tmp_path / "out", "--min_share", min_share)
    assert labels(rows) == expected and (rows[0]["model_0"], rows[0]["model_1"]) == ("flux", "infinity")
    assert [r["share_0"] for r in rows] == [pytest.approx(12 / 19), pytest.approx(16 / 19), 0.5, None, None, None]


def test_chosen_rejected(tmp_path):
    rows, _ = prepared(SETS["chosen_rejected"](tmp_path / "in"), tmp_path / "out")
    assert labels(rows) == [1] * 6 and [r["jpg_1"] for r in rows] == [picture(2 * k + 1) for k in range(6)]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ([], [1, 0, 0.5, 1, 1, 1]),
        (["--question", "alignment"], [0, 1, 0, 1, 0, 1]),
        (["--question", "alignment", "--min_share", "0.9"], [0, 1, 0.5, 1, 0.5, 1]),
        (["--question", "coherence"], [1, 1, 1, 1, 1]),  # the last row has no answer
    ],
)
def test_rapidata(tmp_path, question, expected):
    rows, manifest = prepared(SETS["rapidata"](tmp_path / "in"), tmp_path / "out", *question)
    assert labels(rows) == expected and all(0 <= r["share_0"] <= 1 for r in rows)
    assert manifest["counts"]["dropped"]["no_preference"] == 6 - len(expected)
    assert manifest["options"]["question"] == (question[1] if question else "preference")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ([], [1, 1, 0.5]),  # ranks 1, 2, 2 of images 0, 1, 2: pairs 01, 02, 12
        (["--question", "overall_rating"], [0.5, 0, 0]),  # ratings 3, 3, 6
        (["--question", "image_text_alignment_rating"], [0, 0, 0]),  # 1, 2, 3
        (["--question", "fidelity_rating"], [0.5, 0.5, 0.5]),  # 7, 7, 7
    ],
)
def test_imagereward(tmp_path, question, expected):
    rows, manifest = prepared(SETS["imagereward"](tmp_path), tmp_path / "out", *question)
    assert labels(rows) == expected * 6 and (manifest["counts"]["rows"], manifest["counts"]["pairs"]) == (18, 18)
    assert (rows[2]["jpg_0"], rows[2]["jpg_1"]) == (picture(1, "WEBP"), picture(2, "WEBP"))


def test_imagereward_with_the_images_in_the_table(tmp_path):
    rows = [{"image": {"bytes": picture(i), "path": None}, "prompt_id": "a", "prompt": "p", "rank": i} for i in (2, 1)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    made, _ = prepared(["--format", "imagereward", "--dataset_name", tmp_path / "train.parquet"], tmp_path / "out")
    assert labels(made) == [0] and made[0]["jpg_1"] == picture(1)


def test_a_csv_with_words(tmp_path):
    rows, _ = prepared(SETS["table"](tmp_path), tmp_path / "out")
    assert labels(rows) == [1, 0, 0.5] * 2 and rows[0]["jpg_1"] == picture(1, "PNG")
    assert rows[3]["created_at"].to_pydatetime() == datetime(2024, 5, 4, 12)


@pytest.mark.parametrize(
    ("columns", "options", "expected", "shares"),
    [
        ({"preference": [0.9, 0.4, 0.5]}, [], [1, 0, 0.5], [0.9, 0.4, 0.5]),
        ({"preference": [1, 0, 1]}, [], [1, 0, 1], [1, 0, 1]),
        ({"preference": [True, False, None]}, [], [1, 0], [1, 0]),
        ({"a": [3, 0, 0], "b": [1, 2, 0]}, ["--preference_columns", "[a, b]"], [1, 0], [0.75, 0]),
        ({"w": ["l", "r", ""]}, ["--preference_columns", "w", "--preference_words", "[l, r]"], [1, 0], [None, None]),
    ],
)
def test_a_table_says_what_is_better_in_several_ways(tmp_path, columns, options, expected, shares):
    table = {"prompt": PROMPTS[:3], **{f"image_{i}": [picture(2 * k + i) for k in range(3)] for i in (0, 1)}}
    table |= {"m": ["x", None, "z"], "n": ["y"] * 3, **columns}
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    arguments = ["--format", "table", "--dataset_name", tmp_path / "pairs.parquet", "--model_columns", "[m, n]"]
    rows, _ = prepared(arguments, tmp_path / "out", *options)
    assert labels(rows) == expected and [r["share_0"] for r in rows] == shares
    assert [(r["model_0"], r["model_1"]) for r in rows[:2]] == [("x", "y"), (None, "y")]


def test_every_format_and_question_is_tested_above():
    assert set(FORMATS) == set(SETS)
    assert QUESTIONS["rapidata"][0] == "preference" and QUESTIONS["imagereward"][0] == "rank"


def test_a_winner_needs_more_than_half_and_the_share_asked_for():
    from preparing.formats import Judgement

    def label(p: float, min_share: float, is_share: bool = True) -> float:
        return first_label(Judgement("p", (b"", b""), p, is_share), min_share)

    assert [label(p, 0.5) for p in (0, 0.49, 0.5, 0.51, 1)] == [0, 0, 0.5, 1, 1]
    assert [label(p, 0.75) for p in (0.25, 0.26, 0.5, 0.74, 0.75)] == [0, 0.5, 0.5, 0.5, 1]
    assert [label(p, 1) for p in (0, 0.01, 0.99, 1)] == [0, 0.5, 0.5, 1]
    assert label(1, 1, is_share=False) == 1  # a single judge's word has no share


def test_values_that_a_format_does_not_allow():
    votes = {"prompt": "p", "path1": "a", "path2": "b"}
    with pytest.raises(ValueError, match="choice_dist is 5; expected two items"):
        hpdv3(votes | {"choice_dist": 5}, config("hpdv3"))
    assert hpdv3(votes | {"choice_dist": [0, 0]}, config("hpdv3")).is_share is False
    with pytest.raises(KeyError, match="weighted_results_image1_coherence"):
        rapidata({"prompt": "p", "image1": b"", "image2": b""}, config("rapidata", question="coherence"))
    with pytest.raises(ValueError, match="2 rows of prompt_id x stand together, and it has 3 images"):
        imagereward([{"prompt_id": "x", "image_amount_in_total": 3}] * 2, config("imagereward"))
    row = {"prompt": "p", "image_0": "a", "image_1": "b"}
    for value, message in ((1.5, "from 0 to 1"), ("left", "expected a number"), ([1], "expected a number")):
        with pytest.raises(ValueError, match=message):
            table(row | {"preference": value}, config("table"))
    with pytest.raises(ValueError, match="preference_words are l, r"):
        table(row | {"preference": "both"}, config("table", preference_words=["l", "r"]))
    for pair in ((-1, 2), (float("inf"), 1)):
        with pytest.raises(ValueError, match="at least 0"):
            share_of(*pair)
    assert share_of("3", "1") == 0.75 and share_of(0, 0) is None and share_of(float("nan"), 1) is None
    assert moment(datetime(2024, 1, 1, 12, tzinfo=timezone.utc)) == moment("2024-01-01T12:00:00")
    for value in ("yesterday", None, 5, "0001-01-01"):
        with pytest.raises(ValueError, match="the time is"):
            moment(value)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("layout", ["array", "indented", "lines", "bom"])
def test_json_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block, layout):
    rows = [{"n": n, "text": 'a "quoted" ] } ü, ' * (n % 5), "list": [n, [n]]} for n in range(40)]
    written = {
        "array": json.dumps(rows), "indented": json.dumps(rows, indent=2),
        "lines": "".join(json.dumps(r) + "\n" for r in rows), "bom": "\ufeff" + json.dumps(rows, ensure_ascii=False),
    }[layout]  # fmt: skip
    (tmp_path / "rows.json").write_text(written, encoding="utf-8")
    monkeypatch.setattr("preparing.source.BLOCK", block)
    assert list(json_rows(tmp_path / "rows.json")) == rows


def test_rows_are_numbered_through_files_and_row_groups(tmp_path):
    from preparing.source import find_files, read_rows

    for k in range(3):
        save_chosen_rejected(tmp_path / f"train-{k}.parquet", prompt=[f"{k}{i}" for i in range(6)])
    table = pq.read_table(tmp_path / "train-1.parquet")
    pq.write_table(table, tmp_path / "train-1.parquet", row_group_size=2)
    settings = parse(
        PrepareConfig, ["--format", "chosen_rejected", "--dataset_name", str(tmp_path), "--output_dir", "o"]
    )
    files = find_files(settings).values()
    everything = [row["prompt"] for _, row in read_rows(files, 0, settings)]
    assert everything == [f"{k}{i}" for k in range(3) for i in range(6)]
    for start in range(19):
        found = list(read_rows(files, start, settings))
        assert [row["prompt"] for _, row in found] == everything[start:]
    (where, _), *_ = read_rows(files, 9, settings)
    assert where == f"{tmp_path}/train-1.parquet row 3"


def test_what_is_an_image():
    assert all(is_image(picture(0, kind)) for kind in ("JPEG", "PNG", "WEBP"))
    assert not any(map(is_image, (b"", b"GIF89a", b"RIFF....WAVE", b"<html>")))


# ---------------------------------------------------------------- interrupted, repeated, refused


def outputs(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".writer.lock"}


@pytest.mark.parametrize("name", SETS)
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, monkeypatch, name):
    (tmp_path / "in").mkdir()
    arguments = [*SETS[name](tmp_path / "in"), "--rows_per_file", "2"]
    prepared(arguments, tmp_path / "whole")
    original, calls = prepare_preferences.write_parquet, []

    def fail_on_the_third(path, rows):
        calls.append(1)
        original(path, rows)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_preferences, "write_parquet", fail_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepared(arguments, tmp_path / "out")
    left = outputs(tmp_path / "out")
    assert sorted(left) == [".unfinished.json", "train-00000.parquet", "train-00001.parquet"]
    with pytest.raises(UserError, match="another run's output"):
        prepared([*arguments[:-1], "1"], tmp_path / "out")
    temporary_for(tmp_path / "out/train-00002.parquet").write_text("left by a killed run")
    prepared(arguments, tmp_path / "out")
    assert len(calls) == 3 + len(outputs(tmp_path / "whole")) - 1 - 2  # the first two files are not written again
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_killed_run_goes_on(tmp_path):
    arguments = [*hpdv2(tmp_path), "--rows_per_file", "1"]
    prepared(arguments, tmp_path / "whole")
    command = ["prepare_preferences.py", *arguments, "--output_dir", str(tmp_path / "out")]
    slow = "import sys, time, prepare_preferences as p; w = p.write_parquet\n"
    slow += "p.write_parquet = lambda *a, **k: (w(*a, **k), time.sleep(0.3)); sys.argv = sys.argv[1:]; p.main()"
    with started([sys.executable, "-c", slow, *command]) as process:
        assert wait_for(lambda: (tmp_path / "out/train-00003.parquet").exists(), 60)
        with started([sys.executable, *command]) as second:  # one writer at a time
            assert second.wait(60) == 2 and "another run" in second.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    again = python(*command)
    assert again.returncode == 0 and "already holds this; nothing to do" in again.stdout


def test_files_end_between_input_rows(tmp_path):
    rows, manifest = prepared(SETS["imagereward"](tmp_path), tmp_path / "out", "--rows_per_file", 4)
    sizes = [pq.read_metadata(f).num_rows for f in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sizes == [6, 6, 6] and len(rows) == 18  # three pairs of a prompt stay together
    assert [o["file"] for o in manifest["outputs"]] == [f"train-0000{k}.parquet" for k in range(3)]


def test_what_cannot_be_used_is_counted(tmp_path):
    arguments = SETS["hpdv3"](tmp_path)
    rows = json.loads((tmp_path / "train.json").read_text())
    rows[0]["prompt"], rows[1]["prompt"] = " ", "half a \ud83d pair"
    (tmp_path / rows[2]["path1"]).unlink()
    (tmp_path / rows[3]["path2"]).write_bytes(b"GIF89a")
    (tmp_path / rows[4]["path2"]).write_bytes(b"")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"train\.json row 2: cannot read the image .*/20\.jpg \(No such file") as error:
        prepared(arguments, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    made, manifest = prepared(arguments, tmp_path / "out", "--bad_images", "skip")
    assert [r["ranking_id"] for r in made] == [5]
    dropped = {"unusable_prompt": 2, "no_preference": 0, "missing_image": 2, "unreadable_image": 1}
    assert manifest["counts"] == {"rows": 6, "pairs": 6, "decisive": 1, "ties": 0, "dropped": dropped}


def test_bad_images_may_be_skipped_later(tmp_path):
    arguments = [*SETS["hpdv3"](tmp_path), "--rows_per_file", "2"]
    (tmp_path / "images/uuids/40.jpg").unlink()
    with pytest.raises(UserError, match="bad_images: skip goes on without it"):
        prepared(arguments, tmp_path / "out")
    rows, manifest = prepared(arguments, tmp_path / "out", "--bad_images", "skip")
    assert [r["ranking_id"] for r in rows] == [0, 1, 2, 3, 5] and manifest["counts"]["dropped"]["missing_image"] == 1


REFUSED = {
    "no such file": (["--dataset_name", "{tmp}/none"], r"dataset_name: no such file or folder: .*none"),
    "a hub id": (["--dataset_name", "ymhao/HPDv2"], r"hf download --repo-type dataset ymhao/HPDv2 --local-dir FOLDER"),
    "a folder of images": (["--dataset_name", "{tmp}/train"], r"dataset_name: no parquet files in .*train$"),
    "a folder of JSON": (["--dataset_name", "{tmp}/json"], r"no parquet files in .*json; name one of a\.json, b\.csv$"),
    "an odd file": (["--dataset_name", "{tmp}/odd.txt"], r"odd\.txt is no \.parquet, \.json, \.jsonl or \.csv file"),
    "no row": (["--dataset_name", "{tmp}/empty.json"], r"empty\.json: there is not a single row"),
    "another format": (
        ["--format", "hpdv3"],
        r"train\.json: column path1, path2 is missing; format hpdv3 reads prompt, path1, path2; the file has prompt, f",
    ),
    "another format in parquet": (
        ["--dataset_name", "{tmp}/other.parquet"],
        r"column prompt, file_path, human_preference is missing; .*; the file has prompts, votes$",
    ),
    "broken JSON": (["--dataset_name", "{tmp}/broken.json"], r"broken\.json: not valid JSON"),
    "cut JSON": (["--dataset_name", "{tmp}/cut.json"], r"cut\.json: .*(not valid JSON|has no end)"),
    "no rows but numbers": (["--dataset_name", "{tmp}/numbers.json"], r"expected rows of names and values, found int"),
    "no text": (["--dataset_name", "{tmp}/binary.json"], r"binary\.json: not a text file in UTF-8"),
    "no parquet": (["--dataset_name", "{tmp}/bad.parquet"], r"bad\.parquet: cannot be read"),
    "no images": (["--images", "{tmp}/none"], r"images: no such folder: .*none"),
    "another question": (["--question", "rank"], r"question is 'rank'; format hpdv2 has one question"),
    "an unknown question": (
        ["--format", "rapidata", "--question", "taste"],
        r"question is 'taste'; expected one of: preference, alignment, coherence",
    ),
    "one image column": (["--image_columns", "a"], r"image_columns is \['a'\]; expected 2 different ones"),
    "a list without brackets": (["--image_columns", "a, b"], r"image_columns: 'a, b' is one item"),
    "the same column twice": (["--image_columns", "[a, a]"], r"expected 2 different ones"),
    "words for two columns": (
        ["--preference_columns", "[a, b]", "--preference_words", "[x, y]"],
        r"preference_words belongs to a single column",
    ),
    "a minority": (["--min_share", "0.4"], r"min_share is 0.4; expected at least 0.5"),
    "something else there": (["--output_dir", "{tmp}/train"], r"train holds something else"),
    "a file there": (["--output_dir", "{tmp}/train.json"], r"train\.json is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, case):
    arguments = [*hpdv2(tmp_path), "--output_dir", str(tmp_path / "out")]
    for name, content in {
        "broken.json": b"[nothing]", "cut.json": b'[{"prompt": "a", "file_pa', "odd.txt": b"a",
        "numbers.json": b"[1, 2]", "binary.json": b"\xff\xfe\x00", "bad.parquet": b"PAR1", "empty.json": b"[]",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"prompts": ["a"], "votes": [1]}), tmp_path / "other.parquet")
    (tmp_path / "json").mkdir()
    (tmp_path / "json/a.json").write_text("[]")
    (tmp_path / "json/b.csv").write_text("")
    extra, message = REFUSED[case]
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    values |= dict(zip(extra[::2], [e.format(tmp=tmp_path) for e in extra[1::2]], strict=True))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        prepare_preferences.main([word for item in values.items() for word in item])
    assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before


def test_an_output_inside_the_dataset_is_refused(tmp_path):
    arguments = SETS["chosen_rejected"](tmp_path)
    with pytest.raises(UserError, match="lies inside the dataset"):
        prepared(arguments, tmp_path / "out")


def test_another_input_of_the_same_name_and_size_is_refused(tmp_path):
    arguments = SETS["hpdv3"](tmp_path)
    prepared(arguments, tmp_path / "out")
    file = Path(arguments[arguments.index("--dataset_name") + 1])
    text = file.read_text()
    file.write_text(text.replace(PROMPTS[0], PROMPTS[0][::-1]))
    assert file.stat().st_size == len(text.encode()) and file.read_text() != text
    with pytest.raises(UserError, match=r"another run's output \(other inputs\)"):
        prepared(arguments, tmp_path / "out")


def test_a_finished_folder_says_what_it_was_made_without(tmp_path, capsys):
    arguments = hpdv2(tmp_path)
    (tmp_path / "train" / "02.jpg").unlink()  # of one pair
    prepared(arguments, tmp_path / "out", "--bad_images", "skip")
    capsys.readouterr()
    prepare_preferences.main([*map(str, arguments), "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "already holds this (bad images: 1 pairs are left out; to try them again, delete it first)" in said


def test_a_changed_output_is_refused(tmp_path):
    arguments = SETS["hpdv3"](tmp_path)
    prepared(arguments, tmp_path / "out")
    (tmp_path / "out/train-00000.parquet").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-00000\.parquet has changed since; delete"):
        prepared(arguments, tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not this script's"):
        prepared(arguments, tmp_path / "out")


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match="not a single pair is left"):
        prepared(["--format", "chosen_rejected", "--dataset_name", tmp_path / "t.jsonl"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """2,000 pairs of two 300 kB images are 1.2 GB; the process peaks far below."""
    image = picture(0) + bytes(300_000)
    (tmp_path / "a.jpg").write_bytes(image)
    row = json.dumps({"prompt": "p", "chosen": "a.jpg", "rejected": "a.jpg"})
    (tmp_path / "pairs.jsonl").write_text(f"{row}\n" * 2000)
    code = "import re, sys, prepare_preferences; prepare_preferences.main(sys.argv[1:])\n"
    code += "print('peak', re.search(r'VmHWM:\\s+(\\d+)\\d{3} kB', open('/proc/self/status').read())[1])"
    arguments = ["--format", "chosen_rejected", "--dataset_name", tmp_path / "pairs.jsonl", "--output_dir"]
    done = python("-c", code, *arguments, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak")[1]) < 400
    assert sum(pq.read_metadata(f).num_rows for f in (tmp_path / "out").glob("*.parquet")) == 2000
