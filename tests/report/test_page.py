"""What the page says, and where each figure of it comes from."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from full_folder import make, scores

import plopfast as pf
from plopfast.report.folder import RunFolder
from plopfast.report.page import write_report
from plopfast.report.sections import cost
from plopfast.report.words import points_of
from plopfast.scoring.report import ModuleScore

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "full"
    make(folder)
    return folder


@pytest.fixture
def full(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "full")


def put(folder: Path, name: str, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def page(folder: Path) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", "|", write_report(folder).read_text()).replace("&#39;", "'"))


def lead(folder: Path) -> str:
    """The sentences that open the page."""
    return re.search('<p class="lead">(.*?)</p>', write_report(folder).read_text(), re.S).group(1)


def rows_of(folder: Path, name: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text())))


@pytest.mark.parametrize("winner", ["attn", "all"])
def test_the_best_of_several_better_arms_is_recommended(full, winner):
    def better(trial):
        for arm in trial["arms"]:
            if arm["name"] in ("attn", "all"):
                arm["versus"] |= {"difference": 0.09 if arm["name"] == winner else 0.05, "verdict": "better"}
            if arm["name"] == "mlp":  # better still, but of all weights
                arm["versus"] |= {"difference": 0.2, "verdict": "better"}
                arm["types"] = []

    put(full, "trial.json", better)
    assert f" {winner} (" in lead(full) and points_of({"difference": 0.09, "low": 0.0, "high": 0.0})[:4] in lead(full)


def test_all_weights_that_did_better_are_no_placement_to_recommend(full):
    def better(trial):
        trial["arms"][3]["versus"] |= {"difference": 0.2, "verdict": "better"}
        trial["arms"][3]["types"] = types[:]

    types = ["q_proj"]
    put(full, "trial.json", better)
    recommended = lead(full)
    types.clear()
    put(full, "trial.json", better)
    assert recommended != lead(full) and not lead(full).startswith(recommended.split()[0])


def test_each_figure_of_the_head(full):
    def other(estimate):
        for number, row in enumerate(estimate["choices"]):
            row["memory_of_full"] = (number + 2) / 10

    put(full, "estimate.json", other)
    text = page(full)
    assert "51.9% → 88.0% (85.6% to 90.2%)" in text and "Accuracy on 770 test rows" in text
    assert "20% (estimated)" in text and "30% (estimated)" not in text, "of the folder's own placement"
    assert "24 in 1.5 s" in text and f"{RunFolder(full).placement.parameters:,}" in text


def test_steps_are_in_order_however_they_were_logged(full):
    lines = (full / "metrics.jsonl").read_text().splitlines()
    (full / "metrics.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    page(full)
    rows = rows_of(full, "training")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if row["valid_loss"]] == ["30", "60"] and rows[29]["loss"]


def test_the_time_and_memory_of_stages(full):
    def peaks(trial):
        for number, arm in enumerate(trial["arms"]):
            arm["peak_mib"] = 100.0 + (number + 1) % 5

    put(full, "trial.json", peaks)
    run = RunFolder(full)
    rows = {row[0]: row[1:] for row in cost(run).tables[0].rows}
    tokens = {"score": run.scores.tokens, "train": 9000, "eval": 2 * 1540, "audit": run.scores.tokens, "estimate": None}
    assert {name: row[:3] for name, row in rows.items() if name != "trial"} == {
        name: (3.25, count, 812.5) for name, count in tokens.items()
    }
    assert rows["trial"][:3] == (1900.0, None, 104.0), "the highest of the arms"


def test_each_section_names_the_command_that_made_it(full):
    text = re.sub(r".*?<h2", "<h2", write_report(full).read_text(), count=1, flags=re.S)
    sections = {re.sub("<.*?>", "", part.split("</h2>")[0].split(">", 1)[1]): part for part in text.split("<h2")[1:]}
    for title, stage in {
        "Which modules, and how sure": "score", "Layer by layer": "score", "Before and after": "eval",
        "Can the scores be trusted?": "audit", "What training would take": "estimate", "Training": "train",
        "Placements compared": "trial", "Forgetting": "trial",
    }.items():  # fmt: skip
        assert f"Made by <code>plopfast {stage} --out full" in sections[title], title


def test_the_lowest_and_highest_module_are_named(full):
    text = write_report(full).read_text()
    rows = sorted((float(row["nfn"]), row["type"], row["layer"]) for row in rows_of(full, "nfn_by_layer"))
    for value, type_, layer in (rows[0], rows[-1]):
        assert f"{value:.2f} ({type_}, layer {layer})" in text
    assert {row["layer"] for row in rows_of(full, "nfn_by_layer")} == {str(n) for n in range(12)}


def test_what_has_no_layer_is_not_in_the_heat_map(full):
    report = pf.NFNReport.load(full / "scores.json")
    report.scores["lm_head"] = ModuleScore(1.0, 0.1, 9, "", None, 64, 64)
    report.prompt_stats = None
    report.save(full / "scores.json")
    page(full)
    assert "lm_head" not in {row["module"] for row in rows_of(full, "nfn_by_layer")}
    assert RunFolder(full).whole_types


def test_files_of_a_split_are_all_named(full):
    put(
        full,
        "config.json",
        lambda config: config["data"].update(
            train=[{"file": f"/data/{n}.jsonl", "sha256": f"{n:064x}"} for n in (1, 2)]
        ),
    )
    text = page(full)
    assert "/data/1.jsonl" in text and "/data/2.jsonl" in text


def test_settings_that_are_zero_are_settings(full):
    text = page(full)
    assert "weight_decay 0.0" in text and "packing False" in text and "max_length" not in text


def test_a_choice_by_the_highest_is_judged_by_the_highest(full):
    pf.place(scores(), "plop-inverse", k=2, rank=8).save(full / "placement.json")
    decision = RunFolder(full).decision
    assert decision.types == ["q_proj", "k_proj"] and decision.rule == "plop-inverse" and decision.k == 2
    assert "higher" in lead(full) and "lower" not in lead(full)


def test_types_that_the_scores_do_not_choose_have_no_decision(full):
    placement = pf.place(scores(), "attn", rank=8)
    placement.rule = "plop"
    placement.save(full / "placement.json")
    assert RunFolder(full).decision is None and RunFolder(full).types == placement.types


def test_single_modules_are_not_whole_types(full):
    placement = pf.place(scores(), "plop", k=3, rank=8)
    placement.modules.pop(next(iter(placement.modules)))
    placement.save(full / "placement.json")
    assert not RunFolder(full).whole_types and RunFolder(full).decision is None


def test_a_link_that_leads_nowhere_is_there(full):
    (full / "placement.json").unlink()
    (full / "placement.json").symlink_to(full / "gone.json")
    with pytest.raises(pf.PlopfastError, match="placement.json"):
        write_report(full)


@pytest.mark.parametrize("broken", [{"runs": [{}]}, {"rank_high": None}], ids=str)
def test_what_a_section_misses_is_said_with_the_file(full, broken):
    put(full, "trial.json", lambda trial: trial["arms"][0].update(broken))
    with pytest.raises(pf.PlopfastError, match="trial.json"):
        write_report(full)
