"""Judges behind an HTTP endpoint, asked over a real connection: what they are asked, what is read, what goes wrong."""

import json
import math
import shutil
import time

import evaluations
import numpy as np
import pyarrow.parquet as pq
import pytest
from endpoints import FakeEndpoint
from evaluations import BRIGHT, PROMPTS, arguments, configured, refused
from PIL import Image
from support import ROOT, python

import evaluate
from evaluation import endpoint, questions
from evaluation import score as score_step
from evaluation.compare import compare
from evaluation.questions import QUESTIONS, find_endpoints, read_reply
from evaluation.score import score
from ncp.common.errors import UserError

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out
MODEL = "some/model-7B"


@pytest.fixture
def server():
    with FakeEndpoint(MODEL) as running:
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    monkeypatch.delenv("ENDPOINT_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def at(server: FakeEndpoint, judge: str, *extra: str) -> list[str]:
    return ["--scorers", judge, "--endpoints", f"[{judge}={MODEL}@{server.url}]", *extra]


def scores_of(out, judge: str) -> dict[str, float]:
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    return {r["file"]: r["score"] for r in rows if r["scorer"] == judge}


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


# ---------------------------------------------------------------- what is asked, and what is read


def test_vqascore_is_the_probability_of_yes(assets, out, server):
    server.reply = lambda question, image: {
        "Yes": brightness(image) / 512, " yes": 0.1, "No": 0.25, "The": 0.01
    }  # fmt: skip
    score(configured(assets, out, *at(server, "vqascore")))
    got = scores_of(out, "vqascore")
    assert len(got) == 12
    for file, value in got.items():
        with Image.open(out / file) as image:
            assert value == pytest.approx(brightness(image.convert("RGB")) / 512 + 0.1, abs=1e-9)
    texts = {r["messages"][0]["content"][1]["text"] for r in server.requests}
    assert texts == {f'Does this figure show "{p}"? Please answer yes or no.' for p in PROMPTS}
    asked = {k: v for k, v in server.requests[0].items() if k != "messages"}
    assert asked == {"model": MODEL, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    compared = compare(configured(assets, out, *at(server, "vqascore")))
    assert [r.judge for r in compared.results] == ["vqascore"] and compared.results[0].prompts == 6


def test_several_judges_stand_in_one_report(assets, out, server, capsys):
    """Each with a model of its own, beside a judge that runs here."""
    with FakeEndpoint("one", "unified") as other:
        server.reply = lambda question, image: {"Yes": 0.75, "No": 0.25}
        other.reply = lambda question, image: "cat (object): 1\nFinal Score: 3.5" if "Caption" in question else "7"
        judges = ["vqascore", "unifiedreward", "vlm", "hpsv3", BRIGHT]
        places = [f"vqascore={MODEL}@{server.url}", f"unifiedreward=unified@{other.url}", f"vlm=one@{other.url}",
                  f"hpsv3=one@{other.url}/chat/completions"]  # fmt: skip
        extra = ["--scorers", f"[{', '.join(judges)}]", "--endpoints", f"[{', '.join(places)}]"]
        score(configured(assets, out, *extra, "--vlm_question", "Good {x}? {prompt}!"))
    expected = {"vqascore": 0.75, "unifiedreward": 3.5, "vlm": 7.0, "hpsv3": 7.0}
    assert {judge: set(scores_of(out, judge).values()) for judge in expected} == {j: {v} for j, v in expected.items()}
    asked = {r["messages"][0]["content"][1]["text"] for r in other.requests}
    assert {*PROMPTS, *(f"Good {{x}}? {p}!" for p in PROMPTS)} < asked  # hpsv3: the prompt alone
    # Comparing needs no server; but another model or question is another judge.
    said = evaluate.main(["compare", *arguments(assets, out, *extra, "--vlm_question", "Good {x}? {prompt}!")])
    assert said is None and "unifiedreward" in capsys.readouterr().out
    said = refused(compare, assets, out, *extra)
    assert "scores of 'vlm' are by one, asked 'Good {x}? {prompt}!', the config says one, asked 'Rate" in said
    moved = [*extra[:-1], extra[-1].replace("unified@", "unified-2@")]
    assert "scores of 'unifiedreward' are by unified, asked" in refused(compare, assets, out, *moved)


@pytest.mark.parametrize(
    ("judge", "reply", "value"),
    [
        ("unifiedreward", "cat (object): 1\ncolour: 0.5\nFinal Score: 4", 4),
        ("unifiedreward", "**Final Score:** 3.25.", 3.25),
        ("unifiedreward", "<think>Final Score: 1</think>Final score: 5", 5),
        ("unifiedreward", "Final Score: 9", None),  # not on the scale
        ("unifiedreward", "I would say 4", None),
        ("hpsv3", "9.8125", 9.8125),
        ("hpsv3", " -1.5e-1\n", -0.15),
        ("hpsv3", "9.8 out of 10", None),
        ("vlm", "8", 8),
        ("vlm", "7.5/10", 7.5),
        ("vlm", "I rate it 6 out of 10.", 6),
        ("vlm", "Two cats, 3 dogs. Score: 4", 4),
        ("vlm", "Rating: **5**/10 for 2 cats", 5),
        ("vlm", "<think>2 or 3?</think> 3", 3),
        ("vlm", "From 0 to 10, I would say 8", None),  # a guess would mislead
        ("vlm", "No.", None),
        ("vlm", None, None),  # a refusal has no content
    ],
)
def test_replies_are_read_or_left_out(judge, reply, value):
    got = read_reply(QUESTIONS[judge], {"message": {"content": reply}})
    assert math.isnan(got) if value is None else got == value


def likely(**tokens: float) -> dict:
    top = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
    return {"message": {"content": top[0]["token"]}, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def test_the_probability_of_yes_by_hand():
    question = QUESTIONS["vqascore"]
    assert read_reply(question, likely(Yes=0.5, No=0.25, YES=0.125, Yesterday=0.1)) == pytest.approx(0.625)
    assert read_reply(question, likely(ĠYes=0.5, No=0.25)) == pytest.approx(0.5)
    assert read_reply(question, likely(No=0.9)) == 0  # yes is not among the likeliest
    assert math.isnan(read_reply(question, likely(The=0.9, A=0.1)))
    for choice in ({"logprobs": None}, {}, {"logprobs": {"content": []}}, {"logprobs": {"content": [{}]}}):
        with pytest.raises(UserError, match="sent no probabilities"):
            read_reply(question, choice)


def test_replies_without_a_score_leave_images_out(assets, out, server, capsys):
    server.reply = lambda question, image: "I cannot rate dogs." if "dog" in question else str(int(brightness(image)))
    config = configured(assets, out, *at(server, "vlm"))
    score(config)
    said = capsys.readouterr().out
    assert said.count("no score in the reply 'I cannot rate dogs.'") == 1
    got = scores_of(out, "vlm")
    assert sum(map(math.isnan, got.values())) == 4 and len(got) == 12
    (result,) = compare(config).results
    assert (result.prompts, result.left_out) == (4, 2)
    asked = len(server.requests)
    score(config)  # what was answered is not asked again, scored or not
    assert len(server.requests) == asked


def test_a_model_that_is_no_judge_is_noticed(assets, server, capsys):
    server.reply = lambda question, image: "What a nice picture!"
    config = configured(assets, assets, *at(server, "vlm"))
    judge = endpoint.endpoint_scorer("vlm", config)
    images = [Image.new("RGB", (8, 8))] * 8
    assert all(map(math.isnan, judge(images, ["a cat"] * 8)))
    with pytest.raises(UserError, match=f"none of the first 16 replies of {MODEL} holds a score; the last is 'What"):
        judge(images, ["a cat"] * 8)
    server.reply = lambda question, image: "3" if question.count("dog") else "What a nice picture!"
    judge = endpoint.endpoint_scorer("vlm", config)
    for _ in range(3):  # one that rates some pictures is a judge
        assert judge(images, ["a dog"] + ["a cat"] * 7)[0] == 3


# ---------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "drop", "cut", "hang"])
def test_what_may_pass_is_tried_again(assets, out, server, fault):
    server.reply = lambda question, image: "3"
    server.faults = [fault] * 3
    score(configured(assets, out, *at(server, "vlm", "--endpoint_timeout", "0.3", "--endpoint_attempts", "4")))
    assert set(scores_of(out, "vlm").values()) == {3.0} and len(server.requests) == 15


def test_the_server_says_how_long_to_wait(assets, out, server):
    server.faults = [(429, {"Retry-After": "0.6"}, {"error": {"message": "slow down"}})]
    begun = time.monotonic()
    score(configured(assets, out, *at(server, "vlm")))
    assert 0.6 <= time.monotonic() - begun < 10 and len(server.requests) == 13


def test_pauses_grow(assets, server, monkeypatch):
    waited: list[float] = []

    class Stop:
        def wait(self, seconds):
            waited.append(seconds)

        def is_set(self):
            return False

    monkeypatch.setattr(endpoint, "BACK_OFF", 1.0)
    server.always = 503
    config = configured(assets, assets, *at(server, "vlm", "--endpoint_attempts", "9"))
    judged = ("vlm", questions.Endpoint(MODEL, server.url), QUESTIONS["vlm"], Image.new("RGB", (8, 8)), "a cat")
    with pytest.raises(UserError, match="did not answer in 9 attempts"):
        endpoint.ask(*judged, config, Stop())
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_server_that_stays_away_ends_the_run_and_the_next_one_goes_on(assets, out, server, monkeypatch):
    """What was scored before is kept, and not asked for again."""
    monkeypatch.setattr(score_step, "ROUND", 1)
    server.reply = lambda question, image: str(int(brightness(image)))
    answered: list[str] = []

    def reply(question, image):
        if len(answered) >= 6:
            server.always = 503
        answered.append(question)
        return str(int(brightness(image)))

    server.reply = reply
    extra = at(server, "vlm", "--batch_size", "2", "--endpoint_attempts", "2")
    said = refused(score, assets, out, *extra)
    assert said.startswith(f"scorer 'vlm': {server.url} did not answer in ") and "HTTP status 503" in said
    assert "run evaluate.py score again, which goes on from here" in said
    kept = scores_of(out, "vlm")
    assert 4 <= len(kept) <= 6 and scores_of(out, BRIGHT)
    server.always, server.requests = None, []
    server.reply = lambda question, image: str(int(brightness(image)))
    score(configured(assets, out, *extra))
    assert len(server.requests) == 12 - len(kept)
    got = scores_of(out, "vlm")
    assert len(got) == 12 and kept.items() <= got.items()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, "HTTP status 400 (the server says 400)"),
        (401, "HTTP status 401 (the server says 401); set ENDPOINT_API_KEY in the environment"),
        ((404, {}, {"object": "error", "message": "The model does not exist.\nAsk another."}),
         "HTTP status 404 (The model does not exist. Ask another.)"),
        ((307, {"Location": "http://127.0.0.1:9/elsewhere"}, ""), "HTTP status 307"),
        ("<html>a page of a proxy</html>", "the reply is no JSON but '<html>a page of a proxy</html>'"),
        ({"object": "list"}, 'the reply is no chat completion: {"object": "list"}'),
        ({"choices": []}, 'the reply is no chat completion: {"choices": []}'),
        ({"choices": ["x"]}, "the reply is no chat completion"),
        ([1], "the reply is no chat completion: [1]"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_said_at_once(assets, out, server, fault, message):
    server.always = fault
    said = refused(score, assets, out, *at(server, "vlm", "--batch_size", "1"))
    assert said.startswith(f"scorer 'vlm': {server.url}: ") and message in said
    assert len(server.requests) == 1 and not scores_of(out, "vlm")
    moved = ["--scorers", "vlm", "--endpoints", f"[vlm=another@{server.url}]"]  # nothing is noted of who did not judge
    server.models, server.always = ("another",), None
    score(configured(assets, out, *moved))
    assert set(scores_of(out, "vlm").values()) == {1.0}


def test_a_server_without_probabilities_is_no_vqascore(assets, out, server):
    server.logprobs = False
    server.reply = lambda question, image: {"Yes": 0.9, "No": 0.1}
    assert "sent no probabilities of tokens (logprobs)" in refused(score, assets, out, *at(server, "vqascore"))


def test_a_server_is_looked_for_before_anything_is_scored(assets, out, server):
    extra = ["--scorers", f"[{BRIGHT}, vlm]", "--samples_per_prompt", "1"]
    (out / "scores.parquet").unlink()
    away = [*extra, "--endpoints", f"[vlm={MODEL}@http://127.0.0.1:9/v1]"]
    said = refused(score, assets, out, *away)
    assert said.startswith("scorer 'vlm': http://127.0.0.1:9/v1 does not answer: ") and "refused" in said
    other = [*extra, "--endpoints", f"[vlm=another@{server.url}]"]
    assert f"{server.url} serves {MODEL}; the config asks for another" in refused(score, assets, out, *other)
    assert not (out / "scores.parquet").exists() and not server.requests
    server.lists_models = False  # not every server has a list
    score(configured(assets, out, *extra, "--endpoints", f"[vlm={MODEL}@{server.url}]"))
    assert len(scores_of(out, "vlm")) == 12
    refused_later = configured(assets, out, *away)
    score(refused_later)  # all is scored: nobody is asked


def test_the_key_comes_from_the_environment_and_is_never_shown(assets, out, server, monkeypatch):
    key = "sk-secret-0123456789"
    monkeypatch.setenv("ENDPOINT_API_KEY", key)
    server.always = (401, {}, {"error": {"message": f"Incorrect API key provided: {key}."}})
    said = refused(score, assets, out, *at(server, "vlm"))
    assert "Incorrect API key provided: ***." in said and key not in said
    assert set(server.keys) == {f"Bearer {key}"}
    server.always = None
    score(configured(assets, out, *at(server, "vlm")))
    assert not [f for f in out.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]
    monkeypatch.setenv("ENDPOINT_API_KEY", f"{key}\nx: y")
    (out / "scores.parquet").unlink()
    said = refused(score, assets, out, *at(server, "vlm"))
    assert "ENDPOINT_API_KEY holds a character that no HTTP header can" in said and "secret" not in said


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("vlm", "endpoints: 'vlm'; expected JUDGE=MODEL@URL, such as vqascore=Qwen/"),
        ("vlm=model", "expected JUDGE=MODEL@URL"),
        ("vlm=model@localhost:8000", "expected JUDGE=MODEL@URL"),
        (
            "clip=model@http://h",
            "'clip' is no judge behind an endpoint; these are: vqascore, unifiedreward, hpsv3, vlm",
        ),
        ("vlm=m@http://user:password@h/v1", "the URL of 'vlm' holds one of @ ? #"),
        ("vlm=m@http://h/v1?api_key=abc", "a key is read from the environment (ENDPOINT_API_KEY)"),
        ("vlm=m@http://h:99999/v1", "is no URL"),
        ("vlm=m@http:///v1", "is no URL"),
        ("vlm=m@http://h,vqascore=m@http://h", "is one item; several are written ["),
    ],
)
def test_an_entry_of_another_form_is_one_line(assets, out, entry, message):
    with pytest.raises(UserError) as error:
        configured(assets, out, "--scorers", "vlm", "--endpoints", f"['{entry}']")
    assert message in str(error.value) and "\n" not in str(error.value) and "password" not in str(error.value)


def test_rules_of_the_judges_keys(assets, out):
    for extra, message in (
        (["--scorers", "vqascore"], "scorer 'vqascore' needs an entry in endpoints: vqascore=MODEL@URL"),
        (["--endpoints", "[vlm=a@http://h, vlm=b@http://h]"], "endpoints: 'vlm' is given twice"),
        (["--vlm_question", "Good?"], "vlm_question does not say where the prompt belongs"),
        (["--endpoint_timeout", "0"], "endpoint_timeout is 0.0; expected more than 0"),
        (["--endpoint_attempts", "0"], "endpoint_attempts is 0; expected at least 1"),
    ):
        with pytest.raises(UserError) as error:
            configured(assets, out, *extra)
        assert message in str(error.value)
    found = find_endpoints(["vlm=org/m:free@sub@https://h.example/v1/"])
    assert found == {"vlm": questions.Endpoint("org/m:free@sub", "https://h.example/v1")}


def test_the_program_asks_in_a_process_of_its_own(assets, out, server):
    """evaluate.py score as it is called, the entry as a shell and a YAML file have it."""
    server.reply = lambda question, image: {"Yes": 0.6, "No": 0.4}
    config = out.parent / "config.yaml"
    config.write_text(f"endpoints: [vqascore={MODEL}@{server.url}]\nscorers: [vqascore]\n")
    shutil.copy(assets / "judges_of_the_test.py", out.parent)
    said = python(ROOT / "evaluate.py", "score", "--config", config, *arguments(assets, out, "--scorers", "vqascore"),
                  ENDPOINT_API_KEY="k", no_proxy="127.0.0.1")  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert list(scores_of(out, "vqascore").values()) == pytest.approx([0.6] * 12) and set(server.keys) == {"Bearer k"}
    noted = json.loads(pq.read_table(out / "scores.parquet").schema.metadata[b"noted"])["scorers"]["vqascore"]
    assert noted == f"{MODEL}, asked '{QUESTIONS['vqascore'].text}'"
