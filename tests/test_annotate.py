"""The human judges' page: blind, balanced, answered by keyboard in a real browser; and its votes, counted by hand."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate import annotate, count
from evaluation.annotate import blinded_pairs
from evaluation.protocol import EvaluationConfig
from evaluation.tables import write_index, write_protocol
from evaluation.votes import QUESTIONS, count_votes
from ncp.common.config import parse
from ncp.common.errors import UserError

PROMPTS = [f"prompt number {i} <script>" for i in range(12)]


def configured(output: Path, *extra: str) -> EvaluationConfig:
    fixed = [
        "--pretrained_model_name_or_path",
        "m",
        "--prompts",
        "p",
        "--scorers",
        "clip",
        "--bootstrap_samples",
        "200",
    ]
    models = [] if "--models" in extra else ["--models", "[base, secret=x]"]
    return parse(EvaluationConfig, [*fixed, *models, "--output_dir", str(output), *map(str, extra)])


@pytest.fixture
def out(tmp_path) -> Path:
    """What generate leaves, with plain pictures: `base` dark, `secret` bright."""
    rows = []
    for model, level in (("base", 40), ("secret", 200)):
        for number, prompt in enumerate(PROMPTS):
            file = f"images/{model}/{number:016x}-0.png"
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (level, level, 10 * number)).save(tmp_path / file)
            row = {"model": model, "weights": "w", "prompt_number": number, "prompt": prompt, "category": ""}
            rows.append({**row, "sample": 0, "seed": 987654321, "file": file})
    write_index(configured(tmp_path), rows)
    write_protocol(configured(tmp_path), {}, {"base": {"path": "m"}, "secret": {"path": "x"}})
    return tmp_path


def yaml_list(files: list[Path]) -> str:
    return f"[{', '.join(map(str, files))}]"


def page_of(out: Path) -> tuple[dict, dict, str]:
    """(the page's data, its key, its whole text)."""
    text = (out / "annotation" / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    return data, json.loads((out / "annotation" / "key.json").read_text()), text


# ---------------------------------------------------------------- the page


def test_the_page_is_blind_and_whole(out, capsys):
    annotate(configured(out))
    data, key, text = page_of(out)
    assert "12 pairs" in capsys.readouterr().out
    for secret in (
        "base",
        "secret",
        "images/",
        "987654321",
        "model",
    ):  # the image data are base64: "base64," is no name
        assert secret not in text.replace(";base64,", ""), secret
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text)
    assert [p["prompt"] for p in data["pairs"]] == [p["prompt"] for p in key["pairs"]]
    assert sorted(p["prompt"] for p in data["pairs"]) == sorted(PROMPTS)
    assert [p["prompt"] for p in data["pairs"]] != PROMPTS
    sides = [p["left"] for p in key["pairs"]]
    assert {"base", "secret"} == set(sides)
    for shown, pair in zip(data["pairs"], key["pairs"], strict=True):
        for side in ("left", "right"):
            assert brightness(shown[side]) > 100 if pair[side] == "secret" else brightness(shown[side]) < 100


def brightness(url: str) -> float:
    import base64
    import io

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))[..., 0].mean()


def test_sides_are_balanced_and_do_not_depend_on_other_pairs():
    prompts = [f"p{i}" for i in range(1000)]
    index = [{"model": m, "prompt": p, "sample": 0, "file": f"{m}/{p}"} for m in ("base", "secret") for p in prompts]
    config = configured(Path("o"), "--annotate_prompts", "null")
    pairs = blinded_pairs(config, index)
    left = sum(p["left"] == "base" for p in pairs)
    assert len(pairs) == 1000 and 437 < left < 563  # four standard deviations of a fair coin
    few = blinded_pairs(config, [r for r in index if r["prompt"].endswith("7")])
    assert few == [p for p in pairs if p["prompt"].endswith("7")]  # the same sides in the same order
    some = blinded_pairs(configured(Path("o"), "--annotate_prompts", "30"), index)
    assert len(some) == 30 and all(p in pairs for p in some)
    assert blinded_pairs(configured(Path("o"), "--seed", "1", "--annotate_prompts", "null"), index) != pairs


def test_three_models_make_three_comparisons():
    index = [{"model": m, "prompt": p, "sample": 0, "file": m + p} for m in ("base", "b", "c") for p in ("x", "y")]
    pairs = blinded_pairs(configured(Path("o"), "--models", "[base, b=1, c=2]"), index)
    assert len(pairs) == 6 and len({(p["prompt"], *sorted((p["left"], p["right"]))) for p in pairs}) == 6


def test_a_second_page_does_not_take_the_first_ones_key(out):
    annotate(configured(out))
    before = (out / "annotation" / "key.json").read_bytes()
    annotate(configured(out))  # the same page again
    with pytest.raises(UserError, match="holds another page"):
        annotate(configured(out, "--annotate_prompts", "5"))
    assert (out / "annotation" / "key.json").read_bytes() == before
    with pytest.raises(UserError, match="only one model"):
        annotate(configured(out, "--models", "base"))
    with pytest.raises(UserError, match="no images of other"):
        annotate(configured(out, "--models", "[base, other=x]"))


# ---------------------------------------------------------------- the votes


def ballot(file: Path, judge: str, key: dict, said: list[dict[str, str]]) -> Path:
    """A vote file in which answers name models: {"overall": "secret"}; sides are looked up in the key."""
    votes = []
    for pair, answers in zip(key["pairs"], said, strict=True):
        sides = {pair["left"]: "left", pair["right"]: "right", "tie": "tie", "abstain": "abstain"}
        votes.append({question: sides[answer] for question, answer in answers.items()})
    file.write_text(json.dumps({"page": key["page"], "annotator": judge, "votes": votes}))
    return file


@pytest.fixture
def voted(out) -> tuple[Path, list[Path], dict]:
    """Three judges on four pairs."""
    annotate(configured(out, "--annotate_prompts", "4"))
    key = page_of(out)[1]
    overall = {
        "ann": ["secret", "secret", "secret", "tie"],
        "bob": ["secret", "secret", "base", "tie"],
        "cyd": ["secret", "base", "tie", "abstain"],
    }
    files = []
    for judge, answers in overall.items():
        said = [{"overall": a, "appeal": "secret"} for a in answers]  # nobody was asked about alignment, but cyd:
        if judge == "cyd":
            said[0]["alignment"] = "base"
        files.append(ballot(out / f"votes-{judge}.json", judge, key, said))
    return out, files, key


def test_votes_are_counted_by_hand(voted, capsys):
    out, files, _ = voted
    count(configured(out, "--annotate_prompts", "4", "--votes", yaml_list(files)))
    with open(out / "votes.csv", newline="") as file:
        rows = {r["question"]: r for r in csv.DictReader(file)}
    # Pair 1: 3 of 3 for secret. 2: 2 of 3 for secret. 3: all differ, a tie. 4: two ties, one abstention: a tie.
    overall = rows["overall"]
    assert [overall[k] for k in ("model", "reference", "pairs", "wins", "ties", "losses")] == [
        "secret", "base", "4", "2", "2", "0"
    ]  # fmt: skip
    assert float(overall["win_rate"]) == 0.75 and float(overall["p_value"]) == 0.5
    assert [overall[k] for k in ("votes", "abstentions", "missing")] == ["11", "1", "0"]
    # Kappa over win, tie, loss: counts 300, 201, 111, 020. P = (1 + 1/3 + 0 + 1) / 4 = 0.5833;
    # shares 6/11, 3/11, 2/11: P_e = 49/121 = 0.40496; kappa = (0.58333 - 0.40496) / 0.59504 = 0.29977.
    assert float(overall["kappa"]) == pytest.approx(0.29977, abs=1e-4)
    appeal, alignment = rows["appeal"], rows["alignment"]
    assert (appeal["wins"], appeal["win_rate"], appeal["p_value"]) == ("4", "1.0", "0.125") and appeal["kappa"] == "nan"
    assert [alignment[k] for k in ("pairs", "losses", "votes", "missing")] == ["1", "1", "1", "11"]
    printed = capsys.readouterr().out
    assert "75.0% [" in printed and "0.300" in printed and "undefined" in printed and "ann, bob, cyd" in printed
    assert "75.0% [" in (out / "votes.md").read_text() and Image.open(out / "votes.png").width > 300


def test_the_reference_is_the_model_that_the_config_names_first(voted):
    out, files, _ = voted
    models = ["--models", "[secret=x, base]"]
    tallies = count_votes(configured(out, "--votes", yaml_list(files), *models)).tallies
    assert (tallies[0].reference, tallies[0].model, tallies[0].win_rate) == ("secret", "base", 0.25)


def test_nobody_voted(voted):
    out, _, key = voted
    file = ballot(out / "none.json", "dan", key, [{}] * 4)
    (tally, *_) = count_votes(configured(out, "--votes", str(file))).tallies
    assert (tally.pairs, tally.votes, tally.missing) == (0, 0, 4) and np.isnan(tally.win_rate)
    count(configured(out, "--votes", str(file)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page": "0123456789ab"}, "votes for page 0123456789ab; this output_dir's page is"),
        ({"votes": []}, "0 pairs; the page has 4"),
        ({"votes": [{"overall": "up"}] * 4}, "'overall: up' is no vote; expected left, right, tie, abstain"),
        ({"votes": [{"beauty": "left"}] * 4}, "'beauty: left' is no vote"),
        ({"votes": 3}, "not a file of votes"),
        ({"annotator": "bob"}, "votes of 'bob' are given twice"),
    ],
)
def test_votes_that_do_not_belong_are_refused(voted, change, message):
    out, files, _ = voted
    content = json.loads(files[2].read_text())
    files[2].write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError) as error:
        count(configured(out, "--votes", yaml_list(files)))
    assert message in str(error.value) and files[2].name in str(error.value) and "\n" not in str(error.value)
    assert not (out / "votes.csv").exists()


def test_missing_and_damaged_vote_files_are_refused(voted):
    out, files, _ = voted
    for harm, message in (
        (lambda: files[0].write_text("{"), "not a file of votes as the page exports it"),
        (lambda: files[0].unlink(), "not a file of votes as the page exports it"),
        (lambda: (out / "annotation" / "key.json").write_text("{}"), "key.json: not the key of a page"),
        (lambda: (out / "annotation" / "key.json").unlink(), "key.json is missing"),
    ):
        harm()
        with pytest.raises(UserError, match=re.escape(message)):
            count(configured(out, "--votes", yaml_list(files)))
    assert "the config does not name" in refused_models(voted)


def refused_models(voted) -> str:
    out, files, key = voted
    (out / "annotation" / "key.json").write_text(json.dumps(key))
    file = ballot(files[1], "bob", key, [{}] * 4)
    with pytest.raises(UserError) as error:
        count_votes(configured(out, "--models", "base", "--votes", str(file)))
    return str(error.value)


# ---------------------------------------------------------------- in a real browser


def test_a_judge_answers_by_keyboard_reloads_and_exports(out, browser, tmp_path):
    """Appeal: always the bright image; overall: the dark one; alignment: left, right, tie, cannot say in turn."""
    annotate(configured(out))
    data, key, _ = page_of(out)
    page = browser.new_context(accept_downloads=True).new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((out / "annotation" / "page.html").as_uri())
    page.keyboard.press("ArrowLeft")  # not yet: the judge has no name
    page.fill("#name", "Zoë B")
    page.keyboard.press("Enter")

    turn = [("1", "left"), ("2", "right"), ("3", "tie"), ("0", "abstain")]
    expected, steps = [], 0
    for number, pair in enumerate(key["pairs"]):
        bright = "left" if pair["left"] == "secret" else "right"
        dark = {"left": "right", "right": "left"}[bright]
        digit, answer = turn[number % 4]
        expected.append({"appeal": bright, "overall": dark, "alignment": answer})
        for question, press in (
            ("appeal", {"left": "ArrowLeft", "right": "ArrowRight"}[bright]),
            ("overall", {"left": "ArrowLeft", "right": "ArrowRight"}[dark]),
            ("alignment", digit),
        ):
            assert page.inner_text("#question") == QUESTIONS[question]
            place = f"pair {number + 1} of 12, question {steps % 3 + 1} of 3"
            assert page.inner_text("#place") == place
            shown = page.inner_text("#prompt")
            assert (pair["prompt"] in shown) == (question != "appeal"), shown
            assert page.get_attribute("#left", "src") == data["pairs"][number]["left"]
            page.keyboard.press(press)
            steps += 1
            if steps == 17:  # in the middle of a pair
                page.reload()
                assert page.inner_text("#place") == "pair 6 of 12, question 3 of 3"
                page.keyboard.press("Backspace")
                assert page.inner_text("#question") == QUESTIONS["overall"]
                page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight"}[dark])
    assert page.inner_text("h1:visible") == "Thank you, that was all."
    with page.expect_download() as download:
        page.click("#done .export")
    assert download.value.suggested_filename == f"votes-{key['page']}-Zoë_B.json"
    file = tmp_path / "votes.json"
    download.value.save_as(file)
    assert json.loads(file.read_text()) == {"page": key["page"], "annotator": "Zoë B", "votes": expected}
    assert not errors

    count(configured(out, "--votes", str(file)))
    with open(out / "votes.csv", newline="") as rows:
        tallies = {r["question"]: r for r in csv.DictReader(rows)}
    assert tallies["appeal"]["win_rate"] == "1.0" and tallies["overall"]["win_rate"] == "0.0"
    assert (tallies["alignment"]["pairs"], tallies["alignment"]["abstentions"]) == ("9", "3")

    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#next")  # the next judge starts from nothing
    assert page.is_visible("#name") and page.input_value("#name") == ""
    page.fill("#name", "second")
    page.keyboard.press("Enter")
    assert page.inner_text("#place") == "pair 1 of 12, question 1 of 3"
    page.click("#images [data-answer=left]")  # the mouse works too
    assert page.inner_text("#place") == "pair 1 of 12, question 2 of 3"
