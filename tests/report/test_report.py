"""The report: what it says for which files, that its figures show the files' numbers, and bad input."""

import dataclasses
import json
import re
import shutil

import pytest
from full_folder import TYPES, make, scores
from reading import change, numbers, report, table

import plopfast as pf
from plopfast.cli import main
from plopfast.report.folder import RunFolder
from plopfast.report.page import write_report
from plopfast.report.recommend import placed, recommendation
from plopfast.report.studied import what_the_study_found
from plopfast.support.errors import FileError
from plopfast.support.tables import DIFFERS

SECTIONS = {  # file -> the ids of sections that need it, the CSV files that need it, the command that makes it
    "trial.json": (["trial"], ["trial", "forgetting"], "trial"),
    "eval.json": (["results"], ["before_after", "changes", "by_answer", "confusion", "most_wrong", "general"], "eval"),
    "audit.json": (["audit"], [], "audit"),
    "estimate.json": ([], ["memory"], "estimate"),  # the stages' own times and memory are in its section, too
    "data.json": (["data"], ["row_lengths"], "data"),
    "metrics.jsonl": (["training"], ["training"], "train"),
    "search.json": (["search"], ["search"], "search"),
}
MORE = {"eval.json": {"changes", "by_answer", "confusion", "most_wrong"}}  # which eval_rows.jsonl adds
ALWAYS = {"nfn_by_type", "nfn_by_layer", "time"}
IDS = ["where", "training", "results", "cost", "data", "trial", "audit", "search", "use"]


def lead(folder):
    """The recommendation, which is on the page, after training in the past tense."""
    run, page = RunFolder(folder), report(folder)
    assert placed(run) in page.text or (not run.training and recommendation(run) in page.text)
    return recommendation(run)


def test_every_section_once(whole):
    folder, _, page = whole
    ids = [kept["id"] for tag, kept in page.tags if tag == "h2" and "id" in kept]
    assert page.headings[0] == ["h1", "88% of test rows answered right, up from 52%"]
    assert ids == IDS and len(page.titles) == len(set(page.titles)) == len(IDS) and not page.lacking
    assert [tag for tag, _ in page.headings].count("h1") == 1 and "Not on this page yet" not in page.alts
    pictures = {name for _, names, _ in SECTIONS.values() for name in names} | ALWAYS
    assert {path.name for path in (folder / "report").iterdir()} == {f"{name}.csv" for name in pictures}
    for stage in ("score", "eval", "audit", "estimate", "train", "trial"):
        assert f"plopfast {stage} --out full" in page.text, "the command as it was noted"
    cells = [cells for _, cells in page.rows]
    for fact in (["train", "train.jsonl", f"{10:064x}"], ["trial, general text", "general.txt", "c" * 64], ["machine", "a processor, 2 cores"],
                 ["seed", "0"], ["trial’s seeds", "0, 1, 2"], ["score prompts", "200"]):  # fmt: skip
        assert fact in cells
    assert "torch 2.13.0" in page.text


def test_self_contained_and_semantic(whole):
    _, _, page = whole
    for tag, kept in page.tags:
        assert tag not in ("script", "iframe", "object", "img") and not any(name.startswith("on") for name in kept)
        for name in ("src", "href"):
            assert kept.get(name, "#").startswith(("data:", "#")), (tag, kept)
        assert tag != "th" or kept["scope"] in ("col", "row")
        assert tag != "table" or len(kept["aria-label"]) > 3
        assert kept.get("role") != "img" or re.search(r"\d", kept["aria-label"]), "figures are said with their numbers"
    assert [tag for tag, _ in page.tags].count("table") > 15
    assert ("html", {"lang": "en"}) in page.tags
    links = {kept["href"][1:] for tag, kept in page.tags if tag == "a"}
    assert links == set(IDS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_file_takes_its_section_along_and_its_command_is_named(full, name):
    ids, pictures, stage = SECTIONS[name]
    (full / name).unlink()
    page = report(full)
    assert page.lacking == ids
    assert not any((full / "report" / f"{picture}.csv").exists() for picture in pictures)
    missing = [cells for _, cells in page.rows if cells[-1] == f"plopfast {stage} --out {full}"]
    assert len(missing) == 1 and "Not on this page yet" in page.alts, "and nothing else is missing"
    in_words = name == "trial.json"  # the recommendation offers one
    assert page.text.count(f"plopfast {stage} --out {full}") == 2 + in_words, "once more in its place"


def test_scores_and_placement_alone(full):
    for path in [*full.iterdir()]:
        if path.name not in ("scores.json", "scores.safetensors", "placement.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(full)
    assert {path.stem for path in (full / "report").iterdir()} == ALWAYS - {"time"}
    for _, _, stage in SECTIONS.values():
        assert f"plopfast {stage} --out {full}" in page.text
    assert "only a trial shows it" in page.text and lead(full).endswith(
        f"{what_the_study_found('')} No trial has compared placements on your rows yet: plopfast trial --out {full} does."
    )
    (full / "placement.json").unlink()
    page = report(full)
    assert lead(full).startswith("Put adapters on v_proj, o_proj and down_proj. Their scores are lower than"), (
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
    ids, pictures, _ = SECTIONS.get(name, (["where"], [], ""))
    ids = ids or ["cost"]
    assert page.lacking == [
        section for section in IDS if section not in (*ids, "use") and (section != "cost" or name != "trial.json")
    ]
    assert {path.stem for path in (full / "report").iterdir()} == set(pictures) - MORE.get(name, set())
    for other, (_, _, stage) in SECTIONS.items():
        assert (f"plopfast {stage} --out {full}" in page.text) == (other != name)
    leads = {
        "trial.json": "In the trial, plop did better than attn and showed no difference from plop-inverse, mlp and all.",
        "audit.json": "The pick stays the same on random tokens: it reflects the model rather than the task.",
        "placement.json": "Put rank-8 adapters on v_proj, o_proj and down_proj. They have the lowest NFN, but the scores do not "
        f"say how sure this is. {what_the_study_found('')} No trial has compared placements on your rows yet: plopfast trial --out "
        f"{full} does.",
    }  # fmt: skip
    assert recommendation(RunFolder(full)) == leads.get(
        name, "The files of this folder do not tell which modules should get adapters."
    )


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
    assert f"v_proj {types['v_proj']:.2f}" in " ".join(page.alts), "and in words"


def test_disagreements_are_marked_in_words(whole):
    marked = {cells[0]: cells for class_, cells in whole[2].rows if class_ == "differs"}
    assert marked.keys() == {"input spectrum", "random tokens", "8 prompts"}, "the pick of random weights is chance"
    assert all(any(cell.startswith(DIFFERS) for cell in cells) for cells in marked.values())


def test_the_recommendation_says_how_sure_it_is(full):
    lead_ = lead(full)
    assert lead_.startswith(
        "Put rank-8 adapters on v_proj, o_proj and down_proj. Their scores are lower than every other module type's, and 24 "
        "prompts were enough to be 95% sure."
    )
    assert "In the trial, plop did better than attn and showed no difference from plop-inverse, mlp and all." in lead_
    (full / "trial.json").unlink()
    near = make(full / "near", types=TYPES | {"up_proj": 1.04, "down_proj": 1.041})
    (full / "near" / "trial.json").unlink()
    assert not near.decision.decided
    lead_ = lead(full / "near")
    assert "this is not settled: at 95% confidence, 24 prompts do not tell" in lead_
    for tie in near.decision.near_ties:
        assert " from ".join(tie) in lead_, "near-ties are named"
    pf.place(near, "all").save(full / "placement.json")
    assert "The rule 'all' chose them without the scores." in lead(full)
    pf.place(scores(), "plop", k=7).save(full / "placement.json")
    assert "These are all the module types there are. " in lead(full)
    pf.place(scores(), "plop", k=1).save(full / "placement.json")
    assert lead(full).startswith("Put rank-16 adapters on v_proj. Their scores are lower"), "judged for this k"


def test_single_modules_are_no_decided_types(full):
    placement = pf.Placement.load(full / "placement.json")
    del placement.modules["model.layers.0.v_proj"]
    placement.save(full / "placement.json")
    lead_ = lead(full)
    assert lead_.startswith(
        "Put rank-8 adapters on 35 single modules of v_proj, o_proj and down_proj. They have the lowest NFN"
    )
    assert "the scores do not say how sure this is" in lead_ and "95%" not in lead_


def test_a_better_arm_is_recommended(full):
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[3]["versus"] |= {"difference": 0.05, "low": 0.01, "high": 0.09, "verdict": "better"}
    arms[3]["types"] = ["gate_proj", "up_proj", "down_proj"]
    change(full, "trial.json", arms=arms)
    assert lead(full) == (
        "Use the placement mlp (gate_proj, up_proj and down_proj). In the trial it did better than plop, by "
        "+5.0 (+1.0 to +9.0) points of accuracy, at 95% confidence."
    )


def test_a_worse_placement_is_not_recommended(full):
    pf.place(scores(), "attn", rank=8).save(full / "placement.json")
    assert lead(full) == (
        "Use the placement plop (v_proj). In the trial attn, which this folder holds, differed from it by -9.0 (-11.0 to -7.0) "
        "points of accuracy, at 95% confidence."
    )


def test_a_reference_of_all_weights_is_not_recommended_as_a_placement(full):
    pf.place(scores(), "attn", rank=8).save(full / "placement.json")
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[0] |= {"name": "full", "types": [], "rank_low": None, "rank_high": None}
    change(full, "trial.json", arms=arms, reference="full")
    lead_ = lead(full)
    assert "Use the placement" not in lead_ and "In the trial, full did better than attn" in lead_


def test_all_weights_are_no_placement(full):
    arms = json.loads((full / "trial.json").read_text())["arms"]
    arms[4] |= {"name": "full", "types": [], "rank_low": None, "rank_high": None}
    arms[4]["versus"] |= {"difference": 0.05, "low": 0.01, "high": 0.09, "verdict": "better"}
    change(full, "trial.json", arms=arms)
    lead_ = lead(full)
    assert lead_.startswith("Put rank-8 adapters on v_proj, o_proj and down_proj. Their scores are lower")
    assert (
        "In the trial, plop did worse than full, which trains all weights and did better than attn and showed" in lead_
    )


def test_a_trial_of_other_data_shows_its_own(full):
    other = {"train": {"file": "/data/other.jsonl", "sha256": "d" * 64}}
    change(full, "trial.json", data=other, machine="another machine")
    rows = [cells for _, cells in report(full).rows]
    assert ["train", "train.jsonl", f"{10:064x}"] in rows and ["machine", "a processor, 2 cores"] in rows
    assert ["trial, train", "other.jsonl", "d" * 64] in rows and ["trial, machine", "another machine"] in rows
    assert "trial, versions" not in {cells[0] for cells in rows}, "the same ones are said once"


def test_one_prompt_has_no_interval(tmp_path):
    make(tmp_path, prompts=1)
    page = report(tmp_path)
    assert "No interval is possible: 1 prompt: an interval over prompts needs 8 or more" in page.text
    lead_ = lead(tmp_path)
    assert "nothing is settled: one prompt" in lead_ and "95%" not in lead_
    assert {(row["low"], row["high"]) for row in table(tmp_path, "nfn_by_type")} == {("", "")}


def test_scores_of_an_older_version_or_without_prompts(full):
    kept = json.loads((full / "scores.json").read_text())
    for key in ("intervals", "decision", "prompt_stats_sha256"):
        del kept[key]
    (full / "scores.json").write_text(json.dumps(kept))
    page = report(full)
    assert "No interval is possible: these scores were made before intervals were kept" in page.text
    assert "the scores do not say how sure this is" in lead(full)


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
    assert "script" not in {tag for tag, _ in page.tags} and name.strip() in lead(full)
    assert any(name in alt for alt in page.alts)
    assert table(full, "trial")[0]["placement"] == "'" + arms[1]["name"], "begins with =, which is no formula here"
    for other in ("eval.json", "training.json", "metrics.jsonl"):
        (full / other).unlink()
    page = report(full)
    assert name in page.headings[0][1] and "script" not in {tag for tag, _ in page.tags}


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
    assert "88% of test rows answered right, up from 52%" in page.text
    assert "Share of 770 test rows right. Bands: 95% intervals (Wilson)." in page.text
    assert "770 test rows. Accuracy: choice, with 95% intervals." in page.text
    assert "Accuracy: before 51.9% (48.4% to 55.5%); after 88.0% (85.6% to 90.2%)." in page.alts
    assert any("0.8557 to 0.9016" in cells for _, cells in page.rows) and "flatter the" not in page.text.replace(
        "flatter the test", ""
    )
    assert "Validation: 128 validation rows, looked at every 30 steps." in page.text
    change(full, "eval.json", rows="validation")
    for name in ("trial", "data", "search"):
        (full / f"{name}.json").unlink()
    change(full, "training.json", validation="3 validation rows held out from the training file", unmoved={"v_proj": 2})
    page = report(full)
    assert "88% of validation rows answered right" in page.text and "770 validation rows. Accuracy" in page.text
    assert "There are no test rows: these are the validation rows, which also chose the training step" in page.text
    assert "Validation: 3 validation rows held out from the training file." in page.text
    assert "No gradient ever reached 2 of the trained v_proj." in page.text
    said = page.text.replace("There are no test rows", "").replace("No test rows.", "")
    assert not re.search(r"test (rows\b(?!:)|result)", said), "nor a test anywhere"


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
        "The first train row (train.jsonl, line 1)",
    ):
        assert text in page.text
    assert any("train 8 to 39, half of them up to 19" in alt for alt in page.alts)
    text = (folder / "report.html").read_text()
    assert re.search(r"<span>user: a dog<span[^>]*>⏎</span><br></span><mark>animal</mark>", text), "learned in a mark"


def test_an_older_evaluation_still_shows(full):
    kept = json.loads((full / "eval.json").read_text())
    old = {who: {k: v for k, v in kept[who].items() if "accuracy_" not in k} for who in ("base", "tuned")}
    (full / "eval.json").write_text(json.dumps(old))
    (full / "eval_rows.jsonl").unlink()
    change(full, "training.json", validation=None)
    page = report(full)
    assert page.headings[0][1] == "88% of held-out rows answered right, 52% before", "no interval says that it is up"
    assert "Accuracy: before 51.9%; after 88.0%." in page.alts and "Gain" not in page.text and "Wilson" not in page.text
    assert "770 held-out rows. Accuracy: choice." in page.text and "no test rows" not in page.text
    assert {path.stem for path in (full / "report").iterdir()} & {
        "changes",
        "by_answer",
        "confusion",
        "most_wrong",
        "general",
    } == set()


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


def test_numbers_of_an_earlier_report_go(full):
    (full / "eval.json").unlink()
    write_report(full)
    assert not {"before_after.csv", "changes.csv"} & {path.name for path in (full / "report").iterdir()}
    assert not [path for path in full.iterdir() if path.name.startswith(".")], "nothing half-written stays"
