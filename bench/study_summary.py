"""What the package holds of the study: the agreement of NFN's order with results, and how its pick fared, for each model.

    python bench/study_summary.py bench/results/study.json plopfast/report/studied.json

The report of a run cites it (plopfast/report/studied.py), and tests/report/test_studied.py compares the two files.
"""

import argparse
from pathlib import Path
from typing import Any

from plopfast.support import files

MODELS = {  # of the plan: the name to show, and the model_type of models that are built alike
    "smollm2": ("SmolLM2-135M-Instruct", ["llama"]),
    "gemma": ("Gemma 3 270M", ["gemma3", "gemma3_text"]),
}
RIVALS = ("all", "mlp", "no-qk")


def summary(study: dict[str, Any]) -> dict[str, Any]:
    """Of study.json: {confidence, models: [{model, built_alike, tasks, tau, p, above_plop: {rival: {mean, p}}}]}."""
    found = []
    for name, (model, alike) in MODELS.items():
        taus = [row for row in study["tau_by_model"] if row["model"] == name and row["criterion"] == "plop"]
        rivals = {row["name"]: row for row in study["above_plop_by_model"] if row["model"] == name}
        if not taus:
            continue
        trials = [trial for trial in study["trials"] if trial["model"] == name]
        found.append({
            "model": model, "built_alike": alike, "tasks": len({trial["task"] for trial in trials}),
            "tau": taus[0]["mean"], "p": taus[0]["p"],
            "above_plop": {rival: {key: rivals[rival][key] for key in ("mean", "p")} for rival in RIVALS},
        })  # fmt: skip
    return {"confidence": study["confidence"], "models": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("summary", type=Path)
    given = parser.parse_args()
    files.write_json(given.summary, summary(files.read_json(given.study, "plopfast study")))
