"""Prompts in the published formats of GenEval 2 and DPG-Bench, and prompts that occur in several categories."""

import csv
import json

import evaluations
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import BRIGHT, arguments, configured
from support import ROOT

import evaluate
from evaluation.compare import Scores, compare, compare_all
from evaluation.generate import generate
from evaluation.prompts import read_prompts
from evaluation.protocol import EvaluationConfig
from evaluation.score import score
from ncp.common.config import parse
from ncp.common.errors import UserError

assets, own_judge = evaluations.assets, evaluations.own_judge

# Two lines in the form of geneval2_data.jsonl (facebookresearch/GenEval2, README), the second of our own.
GENEVAL2 = [
    {
        "prompt": "four white bicycles in front of three plastic cows", "atom_count": 7,
        "vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"]],
        "skills": ["count", "attribute"],
    },
    {"prompt": "a red cup on a table", "atom_count": 4, "vqa_list": [["Is it red?", "Yes"]], "skills": ["attribute"]},
]  # fmt: skip
# The columns of dpg_bench.csv (compute_dpg_bench.py in TencentQQGYLab/ELLA), rows of our own.
DPG = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
1,"A red truck, on a beach.",,1,0,entity,whole,entity - whole (truck),Is there a truck?
1,"A red truck, on a beach.",,2,1,attribute,color,"attribute - color (truck, red)",Is the truck red?
1,"A red truck, on a beach.",,3,"1,2",relation,spatial,"relation - spatial (truck, beach, on)",Is the truck on a beach?
partiprompts97,"A ladder, at
night.",,1,0,entity,whole,entity - whole (ladder),Is there a ladder?
"""


def preset(name: str, *extra: object) -> EvaluationConfig:
    return parse(EvaluationConfig, ["--config", str(ROOT / f"configs/eval_{name}.yaml"), *map(str, extra)])


def test_geneval2_is_read_line_by_line(tmp_path):
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text("\n".join(map(json.dumps, GENEVAL2)) + "\n\n")
    rows, repeated = read_prompts(preset("geneval2", "--prompts", file))
    assert [(r["prompt"], r["categories"]) for r in rows] == [
        ("four white bicycles in front of three plastic cows", ["7"]), ("a red cup on a table", ["4"])
    ]  # fmt: skip
    assert repeated == 0
    by_skill, _ = read_prompts(preset("geneval2", "--prompts", file, "--category_column", "skills"))
    assert [r["categories"] for r in by_skill] == [["count", "attribute"], ["attribute"]]  # a list is several


def test_dpg_bench_is_one_row_per_question_and_one_drawing_per_prompt(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(DPG)
    rows, repeated = read_prompts(preset("dpg_bench", "--prompts", tmp_path / "dpg_bench.csv"))
    assert [(r["prompt"], r["category"], r["categories"]) for r in rows] == [
        ("A red truck, on a beach.", "entity", ["entity", "attribute", "relation"]),
        ("A ladder, at\nnight.", "entity", ["entity"]),
    ]
    assert repeated == 2


def test_dpg_benchs_folder_of_single_prompts_has_no_categories(tmp_path):
    for name, text in (("1", "A red truck."), ("256", "A ladder.\n"), ("partiprompts97", "A house.")):
        (tmp_path / f"{name}.txt").write_text(text)
    columns = ("--prompt_column", "null", "--category_column", "null")
    rows, _ = read_prompts(preset("dpg_bench", "--prompts", tmp_path, *columns))
    assert [(r["prompt"], r["categories"]) for r in rows] == [
        (p, [""]) for p in ("A red truck.", "A ladder.", "A house.")
    ]
    (tmp_path / "more.txt").write_text("A tree.\nA red truck.\n")  # files of several prompts are categories
    rows, repeated = read_prompts(preset("dpg_bench", "--prompts", tmp_path, *columns))
    assert [r["categories"] for r in rows] == [["1", "more"], ["256"], ["more"], ["partiprompts97"]] and repeated == 1


def test_the_presets_ask_their_judge():
    for name, samples in (("geneval2", 1), ("dpg_bench", 4)):
        config = preset(name)
        assert config.scorers == ["vqascore"] and config.samples_per_prompt == samples
        assert config.source_of("vqascore").startswith("Qwen/Qwen2.5-VL-7B-Instruct, asked 'Does this figure show")
        with pytest.raises(UserError, match="prompts: no such file or folder: "):
            read_prompts(preset(name, "--prompts", "no/such/file.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not readable"),
        ("3", "is not readable (expected a list of texts or of objects)"),
        ('{"text": "a"}\n{"prompt": "b"}', "has no column 'prompt'; it has text"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read_prompts(preset("geneval2", "--prompts", tmp_path / "p.jsonl", "--category_column", "null"))
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- several categories


def test_a_prompt_of_two_categories_counts_in_both_and_once_among_all():
    table = np.array([[[1.0], [1.0], [1.0]], [[2.0], [0.0], [0.0]]])
    scores = Scores(["a", "b"], ["x", "y", "z"], [["red"], ["red", "blue"], ["blue"]], {"j": table})
    results = {r.category: (r.prompts, r.wins, r.losses) for r in compare_all(scores, ["a", "b"], resamples=100)}
    assert results == {"": (3, 1, 2), "red": (2, 1, 1), "blue": (2, 0, 2)}


def test_a_prompt_of_two_files_is_drawn_once_and_judged_in_both(assets, tmp_path, capsys):
    """The whole way, as with the 28 prompts that HPDv2 has in two of its styles."""
    for name, prompts in (("anime", ["a cat", "a dog"]), ("photo", ["a house", "a cat"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    extra = ["--prompts", str(tmp_path), "--num_inference_steps", "1"]
    config = configured(assets, tmp_path / "out", *extra)
    generate(config)
    assert "2 models x 3 prompts (drawn once: 1 repeated) x 1 samples: 6 images" in capsys.readouterr().out
    index = pq.read_table(tmp_path / "out" / "index.parquet")
    assert {r["prompt"]: (r["category"], r["categories"]) for r in index.to_pylist()} == {
        "a cat": ("anime", ["anime", "photo"]), "a dog": ("anime", ["anime"]), "a house": ("photo", ["photo"])
    }  # fmt: skip
    score(config)
    evaluate.main(["compare", *arguments(assets, tmp_path / "out", *extra)])
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert {r["category"]: r["prompts"] for r in csv.DictReader(file)} == {"": "3", "anime": "2", "photo": "2"}
    assert '"categories": ["anime", "photo"]' in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")

    # An index that an older version wrote has one category per prompt, and its scores no list of them.
    for name in ("index", "scores"):
        table = pq.read_table(tmp_path / "out" / f"{name}.parquet")
        older = table.drop_columns(["categories"]).replace_schema_metadata(table.schema.metadata)
        pq.write_table(older, tmp_path / "out" / f"{name}.parquet")
    old = {r.category: r.prompts for r in compare(config).results}
    assert old == {"": 3, "anime": 2, "photo": 1}
    two = configured(assets, tmp_path / "out", *extra, "--scorers", f"[{BRIGHT}, judges_of_the_test:shy]")
    score(two)  # joins the older table
    assert pq.read_table(tmp_path / "out" / "scores.parquet").schema.field("categories").type == pa.list_(pa.string())
    assert len(compare(two).results) == 2 * 3
