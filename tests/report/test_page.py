"""What the page says, and where each figure of it comes from."""

import json
import re

import pytest
from full_folder import grpo, scores
from reading import Page, change, put, report, table

import plopfast as pf
from plopfast.report.folder import RunFolder
from plopfast.report.page import write_report
from plopfast.report.recommend import recommendation
from plopfast.report.sections_cost import cost, memory_parts
from plopfast.report.sections_use import settings_used
from plopfast.report.words import points_of
from plopfast.scoring.report import ModuleScore


def lead(folder) -> str:
    return recommendation(RunFolder(folder))


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
    text = report(full).text
    assert "88% of test rows answered right, up from 52%" in text
    assert "Gain: +36.1 points (+31.8 to +40.2, paired by row)." in text
    assert "20% of full fine-tuning" in text and "30% of full fine-tuning" not in text, "of the folder's own placement"
    assert "36,864" in text and RunFolder(full).placement.parameters == 36864
    assert "455" in text and "13% of 3,430 training rows, in 60 steps; 770 test rows beside them" in text
    for name in ("eval.json", "training.json", "metrics.jsonl"):
        (full / name).unlink()
    (full / "history.jsonl").write_text(
        (full / "history.jsonl").read_text().replace('"stage": "train"', '"stage": "place"')
    )
    assert "Prompts scored24in 1.5 s" in report(full).text


def test_steps_are_in_order_however_they_were_logged(full):
    lines = (full / "metrics.jsonl").read_text().splitlines()
    (full / "metrics.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    write_report(full)
    rows = table(full, "training")
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert [row["step"] for row in rows if row["valid_loss"]] == ["30", "60"] and rows[29]["loss"]


def test_the_time_and_memory_of_stages(full):
    def peaks(trial):
        for number, arm in enumerate(trial["arms"]):
            arm["peak_mib"] = 100.0 + (number + 1) % 5

    put(full, "trial.json", peaks)
    run = RunFolder(full)
    stages = next(figure for figure in cost(run).figures() if figure.title == "Measured time and memory")
    rows = {row[0]: row[1:] for row in stages.table.rows}
    tokens = {"score": run.scores.tokens, "train": 9000, "eval": 2 * 1540, "audit": run.scores.tokens, "estimate": None}
    assert {name: row[:3] for name, row in rows.items() if name != "trial"} == {
        name: (3.25, count, 812.5) for name, count in tokens.items()
    }
    assert rows["trial"][:3] == (1900.0, None, 104.0), "the highest of the arms"


def test_each_section_names_the_command_that_made_it(full):
    text = write_report(full).read_text()
    sections = {part.split('"')[0]: part for part in text.split('<section aria-labelledby="')[1:]}
    for name, stage in {
        "where": "score",
        "results": "eval",
        "audit": "audit",
        "cost": "estimate",
        "training": "train",
        "trial": "trial",
    }.items():
        assert f"Made by <code>plopfast {stage} --out full" in sections[name], name
    path = full / "history.jsonl"
    path.write_text(path.read_text().replace("plopfast eval --out", "plopfast run --out"))
    assert "Made by <code>plopfast run" not in write_report(full).read_text(), "it made them all: once is enough"


def test_the_lowest_and_highest_module_are_named(full):
    text = write_report(full).read_text()
    rows = sorted((float(row["nfn"]), row["type"], row["layer"]) for row in table(full, "nfn_by_layer"))
    for value, type_, layer in (rows[0], rows[-1]):
        assert f"{value:.2f} ({type_}, layer {layer})" in text
    assert {row["layer"] for row in table(full, "nfn_by_layer")} == {str(n) for n in range(12)}


def test_what_has_no_layer_is_not_in_the_heat_map(full):
    report = pf.NFNReport.load(full / "scores.json")
    report.scores["lm_head"] = ModuleScore(1.0, 0.1, 9, "", None, 64, 64)
    report.prompt_stats = None
    report.save(full / "scores.json")
    write_report(full)
    assert "lm_head" not in {row["module"] for row in table(full, "nfn_by_layer")}
    assert RunFolder(full).whole_types


def test_files_of_a_split_are_all_named_and_no_folder_of_the_machine(full):
    several = [{"file": f"/data/{n}.jsonl", "sha256": f"{n:064x}"} for n in (1, 2)]
    put(full, "config.json", lambda config: config["data"].update(train=several))
    put(full, "data.json", lambda data: data["splits"][0]["notes"].append("row 3 (/data/1.jsonl:3) is odd"))
    text = report(full).text
    assert "1.jsonl" in text and "2.jsonl" in text and "row 3 (1.jsonl:3) is odd" in text
    assert "/data/" not in text


@pytest.mark.parametrize(
    ("model", "shown"), [("/home/me/models/one", "one"), ("C:\\models\\one", "one"), ("some/model", "some/model")]
)
def test_the_model_in_a_line_of_code(full, model, shown):
    (full / "adapter").mkdir()
    (full / "adapter" / "adapter_config.json").write_text("{}")
    (full / "scores.json").unlink()
    put(full, "config.json", lambda config: config.update(model=model))
    page = report(full)
    assert f'name = "{shown}"' in page.text and "/home/me" not in page.text and "C:" not in page.text
    assert ("the folder it was loaded from" in page.text) == (model != shown)
    assert 'AutoModelForCausalLM.from_pretrained(name), "full/adapter")' in page.text


def test_settings_that_were_used_and_no_others(full):
    def settings(config):
        config["settings"] |= {
            "warmup": 0.0,
            "packing": True,
            "offload": False,
            "weight_decay": 0.0,
            "max_length": None,
        }

    put(full, "config.json", settings)
    shown = dict(settings_used(RunFolder(full)))
    assert shown["warmup"] == "0.0" and shown["packing"] == "yes", "not the defaults"
    assert shown["lr"] == "0.001" and shown["score prompts"] == "200" and shown["arms"].startswith("plop,")
    off = {"offload", "weight decay", "max length", "neftune", "device", "bad rows"}
    of_other_commands = {"reward", "generations", "temperature", "max new tokens", "timeout", "fit"}
    assert not (off | of_other_commands) & shown.keys()
    (full / "trial.json").unlink()
    (full / "search.json").unlink()
    assert not {"arms", "seeds", "search trials"} & dict(settings_used(RunFolder(full))).keys()
    for name in ("training.json", "metrics.jsonl"):
        (full / name).unlink()
    shown = dict(settings_used(RunFolder(full)))
    assert "lr" not in shown and shown["warmup"] == "0.0", "nothing was trained here; what is not the default is said"


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


def test_the_measured_memory_in_parts(full):
    path = full / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for peak, stage in ((700.0, "score"), (1000.0, "train")):
        next(line for line in lines if line.get("stage") == stage and line["event"] == "done")["peak_mib"] = peak
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunFolder(full)
    assert memory_parts(run) == {"weights": 513.0, "training": 300.0, "rest": 187.0}
    text = report(full).text
    assert "Before training it held 700 MiB: 513 of weights, and 187 of Python" in text
    assert "Training added 300, where 227 were estimated: the estimate leaves out freed blocks" in text
    put(full, "config.json", lambda config: config.update(device="cuda"))
    assert memory_parts(RunFolder(full)) == {}, "a stage's peak is the CPU's"
    text = report(full).text
    assert (
        "1,000 MiB of CPU memory were measured; the GPU’s were not." in text
        and "1,000 MiB of CPU memory at its peak" in text
    )
    assert "Memory740 MiBestimated, 26% of full fine-tuning" in text and "This placement, measured" not in text


def test_the_warnings_stand_on_the_first_screen_and_in_their_section(full):
    page = report(full)
    assert (
        "Training may have ended too early. The steps saw 13% of the training rows, the last step was the best and 93% of the steps were clipped"
        in page.text
    )
    for said in ("Rows left unseen. The steps took 455 of 3,430 training rows (13%).", "The last step was the best. The validation loss was still falling",
                 "Nearly all steps were clipped (93%).", "To go further: --max-steps 452 (one pass over the rows)."):  # fmt: skip
        assert said in page.text
    change(full, "training.json", rows_seen=3430, clipped=3, best_step=30)
    text = report(full).text
    assert not re.search("ended too early|left unseen|last step was the best|were clipped \\(|To go further", text)
    kept = json.loads((full / "training.json").read_text())
    del kept["rows_seen"], kept["clipped"]
    (full / "training.json").write_text(json.dumps(kept))
    text = report(full).text
    assert "The steps took about 450 of 3,430 training rows" in text, "9,000 tokens of 20 a row"
    assert "Nearly all steps were clipped (98%)" in text, "59 norms of 60 / step are above 1"


def test_a_pick_that_hangs_on_a_few_layers(full):
    report_ = pf.NFNReport.load(full / "scores.json")
    assert "The pick hangs" not in report(full).text
    odd = {name: score for name, score in report_.scores.items() if score.type == "up_proj"}
    report_.scores |= {
        name: ModuleScore(0.9 + 0.01 * score.layer if score.layer else 9.0, 0.1, 9, "up_proj", score.layer, 64, 64)
        for name, score in odd.items()
    }
    report_.prompt_stats = report_.decision = None
    report_.save(full / "scores.json")
    text = report(full).text
    assert (
        "The pick hangs on a few layers. By the median over the layers and by the mean without outlier layers, up_proj would replace down_proj."
        in text
    )
    assert "The interval over prompts does not cover that." in text
    assert "By the mean, down_proj is ahead of up_proj; by the median, behind" in text


def test_what_was_forgotten_and_what_was_lost(full):
    page = report(full)
    assert (
        "1 of 18 answers that had to stay right were lost." in page.text
        and "The loss on general text rose by 1.31 nats per token, from 2.96 to 4.27." in page.text
    )
    assert ["The capital of France?", "Paris", "location"] in [cells for _, cells in page.rows]
    assert (
        "1 answer that had to stay right was lost" in page.text
        and "2 prompts of 20 were wrong before training already." in page.text
    )
    assert table(full, "general") == [{"model": "base", "loss": "2.96"}, {"model": "tuned", "loss": "4.27"}]
    keep = {"file": "keep.jsonl", "prompts": 18, "kept": 18, "lost": [], "wrong_before": 0}
    change(full, "eval.json", must_keep=keep, general={"file": "x.txt", "tokens": 9, "before": 3.0, "after": 2.9})
    text = report(full).text
    assert "All answers that had to stay right did" in text and "General text got easier" in text
    assert "were lost" not in text and "Forgetting. The loss" not in text


def test_samples_before_and_after(full):
    text = report(full).text
    for said in (
        "Two answers side by side",
        "one right after training",
        "✗ should be: animal",
        "A bird is",
        "✓ right",
        "(nothing)",
        "✗ should be: artifact",
    ):
        assert said in text
    change(full, "eval.json", samples=[])
    assert "side by side" not in report(full).text


def test_why_the_first_loss_is_odd(full):
    put(full, "eval.json", lambda value: value["base"].update(answer_loss=1.25, end_loss=23.0))
    put(full, "eval.json", lambda value: value["tuned"].update(answer_loss=0.4, end_loss=None))
    page = report(full)
    assert (
        "The base model hardly ever ends its answer: 23 nats for the end mark; the answer itself cost 1.25 before and 0.4 after."
        in page.text
    )
    assert ["base", "0.5195", "0.4842 to 0.5546", "12.1700", "1.2500", "23.0000", "770"] in [
        cells for _, cells in page.rows
    ]
    assert ["tuned", "0.8805", "0.8557 to 0.9016", "0.2095", "0.4000", "-", "770"] in [cells for _, cells in page.rows]


def test_a_search_and_its_best_settings(full):
    page = report(full)
    rows = [cells for _, cells in page.rows]
    assert "Trial 1 had the lowest validation loss, 0.185." in page.text and "trial 0, had 0.21." in page.text
    assert "4 combinations: two trained to the end, one stopped early and one killed." in page.text
    assert ["rank", "32"] in rows and [
        "1",
        "32",
        "64",
        "0.0005",
        "kaiming",
        "plop",
        "0.1850",
        "32 s",
        "complete",
    ] in rows
    assert rows.index(["1", "32", "64", "0.0005", "kaiming", "plop", "0.1850", "32 s", "complete"]) < [
        r[0] for r in rows
    ].index("0"), "best first"
    assert [row["valid_loss"] for row in table(full, "search")] == ["0.21", "0.185", "0.9", ""]
    change(full, "search.json", best=None, trials=[])
    assert "0 combinations: none." in report(full).text


def test_reinforcement_learning(full):
    grpo(full)
    page = report(full)
    assert "grpo" in [kept.get("id") for tag, kept in page.tags if tag == "h2"]
    assert "earned 0.125 before and 0.625 after, on average." in page.text and "Some completions were cut." in page.text
    assert "reward 0" in page.text and "reward 1" in page.text and "2 + 2 =" in page.text
    assert [row["reward"] for row in table(full, "rewards")] == ["0.1", "0.2", "0.30000000000000004"]
    for name in ("eval.json", "training.json", "metrics.jsonl"):
        (full / name).unlink()
    page = report(full)
    assert (
        page.headings[0][1] == "Mean reward 0.625, up from 0.125"
        and "Mean reward: 0.125 before, 0.625 after." in page.alts
    )
    put(full, "grpo.json", lambda value: [value.pop(key) for key in ("mean_before", "mean_after")])
    (full / "rewards.jsonl").unlink()
    assert "There were no test prompts" in report(full).text


def test_the_page_is_small_and_asks_for_nothing(whole):
    folder, _, page = whole
    text = (folder / "report.html").read_text()
    assert len(text.encode()) < 150_000
    assert not re.search(r"(src|href)=.?http|url\((?!#)|@import|@font-face", text)
    assert isinstance(page, Page)


def test_answers_that_lost_ground(full):
    path = full / "eval_rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["expected"] == " food":
            line["before"]["right"], line["after"]["right"] = 1, 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Food lost ground; " in report(full).text
