"""The report: what it says for which files, that its pictures show the files' numbers, and bad input."""

import csv
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from full_folder import TYPES, make, scores

import plopfast as pf
from plopfast.cli import main
from plopfast.report.page import write_report
from plopfast.support.errors import FileError
from plopfast.support.tables import DIFFERS

SECTIONS = {  # file -> headings that need it, pictures that need it, the command that makes it
    "trial.json": (["Placements compared", "Forgetting"], ["trial", "forgetting"], "trial"),
    "eval.json": (["Before and after"], ["before_after"], "eval"),
    "audit.json": (["Can the scores be trusted?"], [], "audit"),
    "estimate.json": (["What training would take"], ["memory"], "estimate"),
    "data.json": (["What was learned from"], ["row_lengths"], "data"),
    "metrics.jsonl": (["Training"], ["training"], "train"),
}
ALWAYS = {"nfn_by_type", "nfn_by_layer"}


class Page(HTMLParser):
    """What a reader of the page's markup meets."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.alts, self.tags, self.rows, self.lead, self._in = [], [], [], [], "", []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        kept = dict(attributes)
        self.tags.append((tag, kept))
        if tag == "img":
            self.alts.append(kept.get("alt"))
        elif tag not in ("meta", "link"):
            self._in.append((tag, kept.get("class", "")))
        if tag == "tr":
            self.rows.append([kept.get("class", ""), []])

    def handle_endtag(self, tag):
        self._in.pop()

    def handle_data(self, data):
        tag, class_ = self._in[-1] if self._in else ("", "")
        if tag == "style":
            return
        self.text += data
        if tag in ("h1", "h2"):
            self.headings.append((tag, data))
        elif class_ == "lead":
            self.lead += data
        elif tag in ("td", "th"):
            self.rows[-1][1].append(data)


def report(folder):
    return Page(write_report(folder).read_text())


def table(folder, name):
    with (folder / "report" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, *columns):
    return {next(iter(row.values())): tuple(float(row[column]) for column in columns) for row in rows}


def change(folder, name, **values):
    kept = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(kept | values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "full"
    return folder, make(folder), report(folder)


@pytest.fixture
def full(whole, tmp_path):
    """A copy of the whole folder, to change."""
    return shutil.copytree(whole[0], tmp_path / "full")


def test_every_section_once(whole):
    folder, _, page = whole
    wanted = [title for titles, _, _ in SECTIONS.values() for title in titles]
    titles = [title for tag, title in page.headings if tag == "h2"]
    assert page.headings[0][0] == "h1" and len(titles) == len(set(titles)) == len(page.headings) - 1
    assert set(wanted) < set(titles) and titles[0] == "Which modules, and how sure"
    assert "Not on this page yet" not in page.text
    pictures = {name for _, names, _ in SECTIONS.values() for name in names} | ALWAYS
    assert {path.name for path in (folder / "report").iterdir()} == {
        f"{p}.{e}" for p in pictures for e in ("png", "csv")
    }
    assert len(page.alts) == len(pictures) and all(len(alt) > 30 and re.search(r"\d", alt) for alt in page.alts)
    for stage in ("score", "eval", "audit", "estimate", "train", "trial"):
        assert f"plopfast {stage} --out full" in page.text, "the command as it was noted"
    for fact in (
        f"{10:064x}",
        "c" * 64,
        "torch 2.13.0",
        "a processor, 2 cores",
        "0; trial, 0, 1, 2",
        "score_prompts 200",
    ):
        assert fact in page.text


def test_self_contained_and_semantic(whole):
    _, _, page = whole
    for tag, kept in page.tags:
        assert tag not in ("script", "iframe", "object") and not any(name.startswith("on") for name in kept)
        for name in ("src", "href"):
            assert kept.get(name, "#").startswith(("data:", "#")), (tag, kept)
        assert tag != "th" or kept["scope"] in ("col", "row")
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") == names.count("thead") > 8
    assert ("html", {"lang": "en"}) in page.tags
    links = {kept["href"][1:] for tag, kept in page.tags if tag == "a"}
    assert links == {kept["id"] for tag, kept in page.tags if tag == "h2"}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_file_takes_its_section_along_and_its_command_is_named(full, name):
    titles, pictures, stage = SECTIONS[name]
    (full / name).unlink()
    page = report(full)
    assert not {title for _, title in page.headings} & set(titles)
    assert not any((full / "report" / f"{picture}.png").exists() for picture in pictures)
    missing = [cells for _, cells in page.rows if cells[-1] == f"plopfast {stage} --out {full}"]
    assert len(missing) == 1, "and nothing else is missing"


def test_scores_and_placement_alone(full):
    for path in [*full.iterdir()]:
        if path.name not in ("scores.json", "scores.safetensors", "placement.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(full)
    assert {path.stem for path in (full / "report").iterdir()} == ALWAYS
    for _, _, stage in SECTIONS.values():
        assert f"plopfast {stage} --out {full}" in page.text
    assert "Only a trial shows" in page.text and page.lead.endswith(
        "No trial has compared them with other placements yet."
    )
    (full / "placement.json").unlink()
    page = report(full)
    assert page.lead.startswith("Put adapters on v_proj, o_proj and down_proj. Their scores are lower than"), (
        "the scores' own choice"
    )
    assert "No placement is kept here" in page.text and f"plopfast place --out {full}" in page.text
    (full / "scores.json").unlink()
    with pytest.raises(
        FileError, match=r"scores\.json: no such file, nor another to report; it is written by plopfast score"
    ):
        write_report(full)


@pytest.mark.parametrize("name", [*SECTIONS, "placement.json"])
def test_one_file_alone(full, name):
    for path in [*full.iterdir()]:
        if path.name != name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(full)
    titles, pictures, _ = SECTIONS.get(name, ([], [], ""))
    always = ["Time and memory used", "How this was made, and what is known"]
    assert [title for tag, title in page.headings if tag == "h2"] == [*titles, *always]
    assert {path.stem for path in (full / "report").iterdir()} == set(pictures)
    for other, (_, _, stage) in SECTIONS.items():
        assert (f"plopfast {stage} --out {full}" in page.text) == (other != name)
    leads = {
        "trial.json": "In the trial, plop did better than attn and showed no difference from plop-inverse, mlp and all.",
        "audit.json": "The pick stays the same on random tokens: it reflects the model rather than the task.",
        "placement.json": "Put rank-8 adapters on v_proj, o_proj and down_proj. They have the lowest NFN, but the scores do not "
        "say how sure this is. No trial has compared them with other placements yet.",
    }  # fmt: skip
    assert page.lead == leads.get(name, "The files of this folder do not tell which modules should get adapters.")


def test_the_pictures_numbers_are_the_files(whole):
    folder, scored, page = whole
    read = {
        name: json.loads((folder / name).read_text())
        for name in ("scores.json", "eval.json", "estimate.json", "trial.json")
    }
    types, bounds = read["scores.json"]["types"], read["scores.json"]["intervals"]["types"]
    rows = table(folder, "nfn_by_type")
    assert numbers(rows, "nfn", "low", "high") == {t: (types[t], *bounds[t]) for t in types}
    assert [r["type"] for r in rows if r["chosen"] == "True"] == ["v_proj", "o_proj", "down_proj"]
    rows = table(folder, "nfn_by_layer")
    assert numbers(rows, "nfn", "z") == {n: (scored.modules[n], z) for n, z in scored.z_scores().items()}
    assert {row["module"] for row in rows if row["outlier"] == "True"} == set(scored.outliers()) != set()
    columns = ("accuracy", "accuracy_low", "accuracy_high", "loss")
    rows = numbers(table(folder, "before_after"), *columns)
    assert rows == {who: tuple(read["eval.json"][who][key] for key in columns) for who in ("base", "tuned")}
    rows = numbers(table(folder, "memory"), "total_mib", "activations_mib")
    assert rows == {c["name"]: (c["total_mib"], c["activations_mib"]) for c in read["estimate.json"]["choices"]}
    arms = read["trial.json"]["arms"]
    rows = numbers(table(folder, "trial"), "difference", "low", "high", "p_corrected")
    keys = ("difference", "low", "high", "p_corrected")
    assert rows == {arm["name"]: tuple(arm["versus"][key] for key in keys) for arm in arms if arm["versus"]}
    rows = numbers(table(folder, "forgetting"), "forgetting", "general_loss")
    assert rows == {arm["name"]: (arm["forgetting"], arm["general_loss"]) for arm in arms}
    rows, base = (
        numbers(table(folder, "forgetting"), "lowest_seed", "highest_seed"),
        read["trial.json"]["base"]["general_loss"],
    )
    for arm in arms:
        found = [run["general_loss"] - base for run in arm["runs"]]
        assert rows[arm["name"]] == (min(found), max(found)) and min(found) < max(found)
    rows = table(folder, "training")
    assert [row["loss"] for row in rows] == [str(12 / step) for step in range(1, 61)]
    assert {row["step"]: row["valid_loss"] for row in rows if row["valid_loss"]} == {
        "30": str(11 / 30),
        "60": str(11 / 60),
    }
    assert f"v_proj {types['v_proj']:.2f}" in page.alts[0], "and in words"


def test_disagreements_are_marked_in_words(whole):
    marked = {cells[0]: cells for class_, cells in whole[2].rows if class_ == "differs"}
    assert marked.keys() == {"input spectrum", "random tokens", "8 prompts"}, "the pick of random weights is chance"
    assert all(any(cell.startswith(DIFFERS) for cell in cells) for cells in marked.values())


def test_the_recommendation_says_how_sure_it_is(full):
    lead = report(full).lead
    assert lead.startswith(
        "Put rank-8 adapters on v_proj, o_proj and down_proj. Their scores are lower than every other module type's, and 24 "
        "prompts were enough to be 95% sure."
    )
    assert "In the trial, plop did better than attn and showed no difference from plop-inverse, mlp and all." in lead
    (full / "trial.json").unlink()
    near = make(full / "near", types=TYPES | {"up_proj": 1.04, "down_proj": 1.041})
    (full / "near" / "trial.json").unlink()
    assert not near.decision.decided
    lead = report(full / "near").lead
    assert "this is not settled: at 95% confidence, 24 prompts do not tell" in lead
    for tie in near.decision.near_ties:
        assert " from ".join(tie) in lead, "near-ties are named"
    pf.place(near, "all").save(full / "placement.json")
    assert "The rule 'all' chose them without the scores." in report(full).lead
    pf.place(scores(), "plop", k=7).save(full / "placement.json")
    assert "These are all the module types there are. " in report(full).lead
    pf.place(scores(), "plop", k=1).save(full / "placement.json")
    assert report(full).lead.startswith("Put rank-16 adapters on v_proj. Their scores are lower"), "judged for this k"


def test_single_modules_are_no_decided_types(full):
    placement = pf.Placement.load(full / "placement.json")
    del placement.modules["model.layers.0.v_proj"]
    placement.save(full / "placement.json")
    lead = report(full).lead
    assert lead.startswith(
        "Put rank-8 adapters on 35 single modules of v_proj, o_proj and down_proj. They have the lowest NFN"
    )
    assert "the scores do not say how sure this is" in lead and "95%" not in lead


def test_a_better_arm_is_recommended(full):
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[3]["versus"] |= {"difference": 0.05, "low": 0.01, "high": 0.09, "verdict": "better"}
    arms[3]["types"] = ["gate_proj", "up_proj", "down_proj"]
    change(full, "trial.json", arms=arms)
    assert report(full).lead == (
        "Use the placement mlp (gate_proj, up_proj and down_proj). In the trial it did better than plop, by "
        "+5.0 (+1.0 to +9.0) points of accuracy, at 95% confidence."
    )


def test_a_worse_placement_is_not_recommended(full):
    pf.place(scores(), "attn", rank=8).save(full / "placement.json")
    assert report(full).lead == (
        "Use the placement plop (v_proj). In the trial attn, which this folder holds, differed from it by -9.0 (-11.0 to -7.0) "
        "points of accuracy, at 95% confidence."
    )


def test_a_reference_of_all_weights_is_not_recommended_as_a_placement(full):
    pf.place(scores(), "attn", rank=8).save(full / "placement.json")
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[0] |= {"name": "full", "types": [], "rank_low": None, "rank_high": None}
    change(full, "trial.json", arms=arms, reference="full")
    lead = report(full).lead
    assert "Use the placement" not in lead and "In the trial, full did better than attn" in lead


def test_all_weights_are_no_placement(full):
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[4] |= {"name": "full", "types": [], "rank_low": None, "rank_high": None}
    arms[4]["versus"] |= {"difference": 0.05, "low": 0.01, "high": 0.09, "verdict": "better"}
    change(full, "trial.json", arms=arms)
    lead = report(full).lead
    assert lead.startswith("Put rank-8 adapters on v_proj, o_proj and down_proj. Their scores are lower")
    assert (
        "In the trial, plop did worse than full, which trains all weights and did better than attn and showed" in lead
    )


def test_a_trial_of_other_data_shows_its_own(full):
    other = {"train": {"file": "/data/other.jsonl", "sha256": "d" * 64}}
    change(full, "trial.json", data=other, machine="another machine")
    facts = {cells[0]: cells[1] for _, cells in report(full).rows if len(cells) == 2}
    assert facts["data: train"].startswith("/data/train.jsonl") and facts["machine"] == "a processor, 2 cores"
    assert facts["trial, data: train"] == f"/data/other.jsonl, sha256 {'d' * 64}"
    assert facts["trial, machine"] == "another machine" and "trial, versions" not in facts, (
        "the same ones are said once"
    )


def test_one_prompt_has_no_interval(tmp_path):
    make(tmp_path, prompts=1)
    page = report(tmp_path)
    assert "No interval is possible: 1 prompt: an interval over prompts needs 8 or more" in page.text
    assert "nothing is settled: one prompt" in page.lead and "95%" not in page.lead
    assert {(row["low"], row["high"]) for row in table(tmp_path, "nfn_by_type")} == {("", "")}


def test_scores_of_an_older_version_or_without_prompts(full):
    kept = json.loads((full / "scores.json").read_text())
    for key in ("intervals", "decision", "prompt_stats_sha256"):
        del kept[key]
    (full / "scores.json").write_text(json.dumps(kept))
    page = report(full)
    assert "No interval is possible: these scores were made before intervals were kept" in page.text
    assert "the scores do not say how sure this is" in page.lead


def test_what_has_no_score_is_named(full):
    kept = scores()
    kept.notes = ["left out: 86% of the layers' weights, the experts (down_proj, gate_up_proj)"]
    kept.save(full / "scores.json")
    assert f"Not scored, and {kept.notes[0]}." in report(full).text
    kept.notes = ["no token reached 2 of 16 experts"]
    kept.save(full / "scores.json")
    assert "No token reached 2 of 16 experts." in report(full).text


def test_hostile_names_stay_text(full):
    name = "<script>alert('x')</script>&\"$x^$ "
    odd = scores()
    odd.scores = {n: dataclasses.replace(s, type=s.type.replace("v_proj", name)) for n, s in odd.scores.items()}
    odd.model, odd.decision = name, odd.decide(3)
    odd.save(full / "scores.json")
    pf.place(odd, "plop").save(full / "placement.json")
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[1]["name"] = "=" + name * 9
    change(full, "trial.json", arms=arms, command=name)
    page = report(full)
    assert "script" not in {tag for tag, _ in page.tags} and name in page.lead and name in page.headings[0][1]
    assert any(name in alt for alt in page.alts)
    assert table(full, "trial")[0]["placement"] == "'" + arms[1]["name"], "begins with =, which is no formula here"


def test_no_general_text_and_all_weights(full):
    trial = json.loads((full / "trial.json").read_text())
    trial["base"]["general_loss"] = None
    trial["arms"][1] |= {"rank_low": None, "rank_high": None}
    change(full, "trial.json", **trial)
    page = report(full)
    assert "Forgetting" not in [title for _, title in page.headings] and "Placements compared" in [
        title for _, title in page.headings
    ]


def test_the_rows_that_judge_are_named(full):
    page = report(full)
    assert "Accuracy on 770 test rows" in page.text and "51.9% → 88.0% (85.6% to 90.2%)" in page.text
    assert "770 test rows. Accuracy: choice, with 95% intervals." in page.text
    assert "from 0.519 (0.484 to 0.555) to 0.880 (0.856 to 0.902)" in " ".join(page.alts)
    assert any("0.8557 to 0.9016" in cells for _, cells in page.rows) and "flatter" not in page.text
    assert "Validation: 128 validation rows, looked at every 30 steps." in page.text
    change(full, "eval.json", rows="validation")
    (full / "trial.json").unlink()
    (full / "data.json").unlink()
    change(full, "training.json", validation="3 validation rows held out from the training file", unmoved={"v_proj": 2})
    page = report(full)
    assert "Accuracy on 770 validation rows" in page.text and "770 validation rows. Accuracy" in page.text
    assert "There are no test rows: these are the validation rows, which also chose the training step" in page.text
    assert "Validation: 3 validation rows held out from the training file." in page.text
    assert "No gradient ever reached 2 of the trained v_proj." in page.text
    assert not re.search(r"test (rows\b(?!:)|result)", page.text.replace("There are no test rows", "")), (
        "nor a test anywhere"
    )


def test_what_was_learned_from(whole):
    folder, _, page = whole
    lengths = table(folder, "row_lengths")
    assert sum(int(row["rows"]) for row in lengths if row["split"] == "train") == sum(
        count for _, count in json.loads((folder / "data.json").read_text())["splits"][0]["histogram"]
    )
    assert any(cells == ["train", "3,430", "68,600", "10.0%", "8", "19", "29", "39"] for _, cells in page.rows)
    for text in (
        "train: columns that are not used: 'id'.",
        "of 770 test rows, 3 have the prompt of one.",
        "what is learned in double brackets: user: a dog\n[[animal]]",
    ):
        assert text in page.text
    assert any("train 8 to 39, half of them up to 19" in alt for alt in page.alts)


def test_an_older_evaluation_still_shows(full):
    kept = json.loads((full / "eval.json").read_text())
    old = {who: {k: v for k, v in kept[who].items() if "accuracy_" not in k} for who in ("base", "tuned")}
    (full / "eval.json").write_text(json.dumps(old))
    change(full, "training.json", validation=None)
    page = report(full)
    assert "Accuracy on 770 held-out rows" in page.text and "51.9% → 88.0%" in page.text and "88.0% (" not in page.text
    assert "770 held-out rows. Accuracy: choice." in page.text and "no test rows" not in page.text


@pytest.mark.parametrize("name", ["trial.json", "eval.json", "audit.json", "estimate.json"])
def test_a_damaged_file_is_named(full, name):
    before = (full / "report.html").stat().st_mtime_ns, sorted(path.name for path in (full / "report").iterdir())
    for text, message in (
        ('{"plopfast": "x"}', r"\w+: is missing; make it anew with plopfast .* --overwrite"),
        ('{"arms": ', "not valid JSON"),
    ):
        (full / name).write_text(text)
        with pytest.raises(FileError, match=f"{name}.*{message}"):
            write_report(full)
    after = (full / "report.html").stat().st_mtime_ns, sorted(path.name for path in (full / "report").iterdir())
    assert before == after, "the earlier page is intact"


def test_a_folder_of_the_users_stays(full, capsys):
    own = full / "report" / "own.txt"
    own.write_text("mine")
    before = (full / "report.html").read_bytes()
    for options in ([], ["--overwrite"]):
        assert main.main(["report", "--out", str(full), *options]) == 2 and own.read_text() == "mine"
    assert f"{own}: in the way" in capsys.readouterr().err and (full / "report.html").read_bytes() == before
    own.unlink()
    assert main.main(["report", "--overwrite", "--out", str(full)]) == 0


def test_pictures_of_an_earlier_report_go(full):
    (full / "eval.json").unlink()
    write_report(full)
    assert not {"before_after.png", "before_after.csv"} & {path.name for path in (full / "report").iterdir()}
    assert not [path for path in full.iterdir() if path.name.startswith(".")], "nothing half-written stays"
