"""Reinforcement learning: what completions earned, step by step, and some of them before and after."""

from typing import Any

from .figures import Bar, Chart, Csv, Notes, Plot, Samples, Section
from .folder import RunFolder
from .scales import binned, counted, linear
from .words import capital, digits, several, short, short_end

SHOWN = 1000  # characters of a completion
REWARDS = ("step", "reward", "length", "entropy", "kl")


def grpo(run: RunFolder) -> Section:
    """grpo.json and rewards.jsonl: the reward before and after, its course, and completions."""
    found = run.grpo
    section = Section(id="grpo", title="Reinforcement learning", command=run.noted("grpo"))
    section.answer = [
        f"Completions were rewarded by {found['reward']}, over {several(found['steps'], 'step')} of GRPO."
    ]
    if "mean_before" in found:
        section.answer.append(
            f"The most likely completions of {found['test_prompts']} test prompts earned {found['mean_before']:.3f} before and "
            f"{found['mean_after']:.3f} after, on average."
        )
    else:
        section.answer.append("There were no test prompts: only the rewards of the training prompts are known.")
    section.caveats = [capital(note) for note in found["notes"]]
    rows: list[tuple[Any, ...]] = [tuple(record.get(name) for name in REWARDS) for record in run.rewards]
    drawn = [(row[0], row[1]) for row in rows if row[1] is not None]
    if drawn:
        dots, size = binned(drawn)
        section.body.append(Plot(
            title=f"Reward went from {digits(drawn[0][1])} to {digits(drawn[-1][1])}", sub=f"Mean reward of the completions drawn in {'a step' if size == 1 else f'{size} steps'}",
            x=counted(rows[-1][0], 8), y=linear([y for _, y in drawn], zero=True, most=4),
            dots=dots, line=dots, height=200, axis="step", alt=f"Mean reward of each of {len(rows)} steps, from {drawn[0][1]:.3f} to {drawn[-1][1]:.3f}.",
            csv=Csv("rewards", REWARDS, rows),
        ))  # fmt: skip
    if found["samples"]:
        section.body.append(Samples(
            title="Most likely completions of test prompts", sub="Greedy, before and after",
            samples=[(short_end(s["prompt"]), short(s["before"], SHOWN), short(s["after"], SHOWN), f"reward {s['reward_before']:.3g}", f"reward {s['reward_after']:.3g}") for s in found["samples"]],
        ))  # fmt: skip
    if not section.body:
        section.body.append(Notes(["No reward of a step is kept here."]))
    return section


def rewards_chart(run: RunFolder) -> Chart | None:
    """The reward before and after, for the head of the page."""
    if "mean_before" not in run.grpo:
        return None
    before, after = run.grpo["mean_before"], run.grpo["mean_after"]
    bars = [
        Bar(name="Before", text=f"{before:.3f}", dots=[(before, False)]),
        Bar(name="After", text=f"{after:.3f}", dots=[(after, True)], on=True),
    ]
    return Chart(
        title="", rows=bars, scale=linear([before, after], zero=True, most=4), look="hero", height=58, alt=f"Mean reward: {before:.3f} before, {after:.3f} after.",
        note=f"Mean reward of the most likely completions of {several(run.grpo['test_prompts'], 'test prompt')}. No interval is known.",
    )  # fmt: skip
