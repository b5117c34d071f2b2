"""The section on reinforcement learning: what completions earned, step by step, and some of them before and after."""

from ..support.tables import Column, Table
from . import pictures
from .folder import RunFolder
from .pictures import Picture
from .sections import Section

HEAD = ("step", "reward", "length", "entropy", "kl")


def reinforcement(run: RunFolder) -> list[Section]:
    """grpo.json and rewards.jsonl: the reward before and after, its course, and completions."""
    found = run.grpo
    texts = [f"Completions were rewarded by {found['reward']}, over {found['steps']} steps of GRPO."]
    if "mean_before" in found:
        texts.append(
            f"The most likely completions of {found['test_prompts']} test prompts earned {found['mean_before']:.3f} before and "
            f"{found['mean_after']:.3f} after, on average."
        )
    else:
        texts.append("There were no test prompts: only the rewards of the training prompts are known.")
    texts += [f"{note[0].upper()}{note[1:]}." for note in found["notes"]]
    rows = [tuple(record.get(name) for name in HEAD) for record in run.rewards]
    drawn = [row[1] for row in rows if row[1] is not None]
    shown = []
    if drawn:
        alt = f"Mean reward of each of {len(rows)} steps, from {drawn[0]:.3f} to {drawn[-1]:.3f}."
        shown = [
            Picture("rewards", alt, "Completions that were drawn in training.", HEAD, rows, pictures.rewards(rows))
        ]
    columns = [Column("prompt"), Column("before"), Column("reward", ".3g"), Column("after"), Column("reward", ".3g")]
    cells = [(s["prompt"], s["before"], s["reward_before"], s["after"], s["reward_after"]) for s in found["samples"]]
    tables = [Table("Most likely completions of test prompts", columns, cells)] * bool(cells)
    return [Section("grpo", "Reinforcement learning", texts, shown, tables)]
