"""--print-peft: what is pasted into PEFT, TRL, Axolotl and Unsloth adapts the placement's modules, with its ranks and alphas."""

import ast
import json
import sys

import pytest
import yaml
from helpers import adapted_in, build, plopfast
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser, get_peft_config
from zoo import families

import plopfast as pf
from plopfast.integrations.snippets import Adapter, snippets
from plopfast.lora.layer import adapters
from plopfast.models.experts import weights_of
from plopfast.run import run, stages, whole

TOOLS = ("PEFT", "TRL", "Axolotl", "Unsloth")


def made(architecture):
    return build(architecture) if architecture in ("llama", "gpt2") else families.build(architecture)


def placed(model, ends, ranks=(2,), alphas=(4.0,)):
    infos = [info for info in weights_of(model) if info.name.endswith(tuple(ends))]
    modules = {info.name: (ranks[i % len(ranks)], alphas[i % len(alphas)]) for i, info in enumerate(infos)}
    experts = {info.name: info.experts for info in infos if hasattr(info, "experts")}
    return pf.Placement(modules, list(ends), "explicit", 0, experts=experts)


def blocks(text):
    """The first comments, and the text for each tool."""
    first, *rest = text.split("\n\n# ")
    found = {block.split()[0].rstrip(":"): f"# {block}" for block in rest}
    assert list(found) == list(TOOLS)
    return first, found


def from_peft(text, model, folder):
    space = {"model": model}
    exec(text, space)
    return space["model"]


def from_trl(text, model, folder):
    path = folder / "trl.yaml"
    path.write_text(text)
    (config,) = TrlParser((ModelConfig,)).parse_args_and_config(["--config", str(path)])
    return get_peft_model(model, get_peft_config(config))


def from_axolotl(text, model, folder):
    """As Axolotl's loaders/adapter.py calls PEFT."""
    cfg = yaml.safe_load(text)
    assert cfg.pop("adapter") == "lora"
    renamed = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    given = {
        renamed.get(name) or name.removeprefix("lora_").removeprefix("peft_"): value for name, value in cfg.items()
    }
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"target_parameters": [], **given}))


def from_unsloth(text, model, folder):
    """As Unsloth's FastLanguageModel.get_peft_model calls PEFT: other keywords are handed on."""
    (statement,) = ast.parse(text).body
    call = statement.value
    assert ast.unparse(call.func) == "FastLanguageModel.get_peft_model" and ast.unparse(call.args[0]) == "model"
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert isinstance(given["target_modules"], list) and type(given["r"]) is int
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **given))


READ = dict(zip(TOOLS, (from_peft, from_trl, from_axolotl, from_unsloth), strict=True))
CASES = {  # architecture, ends of names, ranks, alphas
    "types": ("llama", ["v_proj", "down_proj"], (2,), (4.0,)),
    "a single type": ("llama", ["v_proj"], (3,), (6.0,)),
    "a single module": ("llama", ["layers.1.mlp.up_proj"], (3,), (6.0,)),
    "some modules": ("llama", ["0.self_attn.q_proj", "2.mlp.up_proj"], (3,), (6.0,)),
    "many names": (
        "llama",
        ["0.self_attn.q_proj", "1.self_attn.q_proj", "2.mlp.up_proj", "0.mlp.gate_proj"],
        (3,),
        (6.0,),
    ),
    "several ranks": ("llama", ["v_proj", "down_proj"], (2, 5), (4.0, 9.0)),
    "an odd alpha": ("llama", ["v_proj", "down_proj"], (2,), (4.5,)),
    "Conv1D": ("gpt2", ["c_attn", "mlp.c_proj"], (2,), (4.0,)),
    "experts alone": ("mixtral", ["down_proj"], (2,), (4.0,)),
    "experts and others": ("mixtral", ["down_proj", "gate_up_proj", "v_proj"], (2, 3), (4.0,)),
    "shared experts": ("qwen2_moe", ["v_proj", "down_proj"], (2,), (4.0,)),
}


@pytest.mark.parametrize("with_model", [True, False], ids=["briefly", "full-names"])
@pytest.mark.parametrize("case", CASES)
def test_each_adapts_the_placements_modules(case, with_model, tmp_path):
    architecture, *how = CASES[case]
    if case == "shared experts" and not with_model:
        pytest.skip("PEFT takes such names for the experts' own: only the model tells")
    placement = placed(made(architecture), *how)
    first, found = blocks(snippets(placement, made(architecture) if with_model else None))
    assert first == f"# {str(placement).splitlines()[0]}"
    uniform = len(set(placement.modules.values())) == 1
    for tool, read in READ.items():
        theirs = adapted_in(read(found[tool], made(architecture), tmp_path))
        if tool == "TRL" and not uniform:
            assert "TRL's YAML has one rank and one alpha" in found[tool] and theirs.keys() == placement.modules.keys()
        else:
            assert theirs == placement.modules and "one rank" not in found[tool], tool
    assert ("Axolotl refuses an alpha" in found["Axolotl"]) == (case == "an odd alpha")
    assert ("the patterns need an Axolotl" in found["Axolotl"]) == (not uniform)
    if with_model and case in ("types", "several ranks"):
        assert all('target_modules=["down_proj", "v_proj"]' in found[tool] for tool in ("PEFT", "Unsloth"))
        assert all('\nlora_target_modules: ["down_proj", "v_proj"]\n' in found[t] + "\n" for t in ("TRL", "Axolotl"))


def scalings(wrapped):
    """Scaling, dropout and whether DoRA, of each adapted module; and how spread A is."""
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            drop = getattr(module.lora_dropout["default"], "p", 0.0)
            found[name] = round(module.scaling["default"], 6), drop, module.use_dora["default"]
    return found


@pytest.mark.parametrize(
    "adapter", [Adapter(rslora=True), Adapter(dropout=1e-5), Adapter(dora=True, dropout=0.25)], ids=str
)
def test_what_the_run_would_use(adapter, tmp_path):
    model = made("llama")
    placement = placed(model, ["v_proj", "down_proj"], (4,), (6.0,))
    _, found = blocks(snippets(placement, model, adapter))
    pf.inject(model, placement, dropout=adapter.dropout, rslora=adapter.rslora, dora=adapter.dora)
    ours = {n: (round(m.scaling, 6), adapter.dropout, adapter.dora) for n, m in adapters(model).items()}
    for tool, read in READ.items():
        assert scalings(read(found[tool], made("llama"), tmp_path)) == ours, tool


def test_inits(tmp_path):
    """PEFT's gaussian is plopfast's, and spreads A by 1 / rank; its other inits are not."""
    placement = placed(made("llama"), ["v_proj", "down_proj"], (4,))
    first, found = blocks(snippets(placement, made("llama"), Adapter(init="gaussian")))
    assert "init" not in first and "no field for init gaussian" in found["TRL"]
    for tool, read in READ.items():
        drawn = [p for n, p in read(found[tool], made("llama"), tmp_path).named_parameters() if "lora_A" in n]
        assert (sum(float(p.abs().max() > 0.5) for p in drawn) > 0) == (tool != "TRL"), "kaiming keeps within 0.18"
    for init in ("orthogonal", "eva"):
        first, found = blocks(snippets(placement, made("llama"), Adapter(init=init)))
        assert f"plopfast's init {init} is not PEFT's" in first and not any("init" in text for text in found.values())


@pytest.mark.parametrize("adapter", [Adapter(dropout=0.5), Adapter(dora=True)], ids=str)
def test_what_peft_has_not_for_experts_is_said(adapter, tmp_path):
    placement = placed(made("mixtral"), ["down_proj", "v_proj"])
    first, found = blocks(snippets(placement, made("mixtral"), adapter))
    assert "\n# without " in first
    for tool, read in READ.items():
        assert adapted_in(read(found[tool], made("mixtral"), tmp_path)) == placement.modules, tool


def test_a_module_within_one_of_its_name(tmp_path):
    """Where full names match others too, a pattern tells them apart; Unsloth has no patterns, and says so."""
    model = made("llama")
    model.model.layers[0].mlp.model = made("llama").model
    placement = placed(made("llama"), ["v_proj"])
    _, found = blocks(snippets(placement, model))
    for tool, read in READ.items():
        again = made("llama")
        again.model.layers[0].mlp.model = made("llama").model
        theirs = adapted_in(read(found[tool], again, tmp_path))
        if tool == "Unsloth":
            assert "takes names alone" in found[tool] and theirs.keys() > placement.modules.keys()
        else:
            assert theirs == placement.modules, tool


def test_peft_need_not_be_installed(monkeypatch):
    placement = placed(made("llama"), ["v_proj"])
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "from peft import" in snippets(placement, made("llama"))


def adapted_by(text, folder, tmp_path, tool="PEFT"):
    _, found = blocks(text[text.index("# plop:") :])
    return adapted_in(READ[tool](found[tool], AutoModelForCausalLM.from_pretrained(folder), tmp_path))


def test_the_commands_show_it(base, model_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert plopfast("score", *base[:8], "--score-prompts", 12, "--k", 2, "--rank", 3, "--out", out, "--print-peft") == 0
    scored = capsys.readouterr().out
    assert "nothing is placed yet" in scored and not (out / "placement.json").exists()
    monkeypatch.setattr(run, "load_model", None)  # names come without weights
    assert plopfast("place", "--out", out, "--print-peft") == 0
    said = capsys.readouterr().out
    modules = pf.Placement.load(out / "placement.json").modules
    assert "nothing is placed" not in said and {rank for rank, _ in modules.values()} == {3}
    for tool in TOOLS:
        assert (
            adapted_by(said, model_folder, tmp_path, tool)
            == adapted_by(scored, model_folder, tmp_path, tool)
            == modules
        )
    assert (
        'target_modules=["' in said
        and "full names" not in said
        and "print_peft" not in (out / "config.json").read_text()
    )
    (model_folder / "config.json").unlink()
    assert plopfast("place", "--out", out, "--overwrite", "--print-peft") == 0
    said = capsys.readouterr().out
    assert "# full names, as the model's own names cannot be had: " in said and json.dumps(next(iter(modules))) in said


def test_a_run_shows_it_with_its_settings(base, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole, "run_all", lambda run: (stages.run_score(run), stages.run_place(run)) and "the summary")
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out, "--rslora", "--dropout", 0.25, "--print-peft") == 0
    said = capsys.readouterr().out
    assert said.startswith("the summary\n# plop:") and "use_rslora=True" in said and "lora_dropout: 0.25" in said
    assert adapted_by(said, model_folder, tmp_path) == pf.Placement.load(out / "placement.json").modules


def test_full_training_has_nothing_to_show(base, tmp_path, capsys):
    assert plopfast("run", *base, "--full", "--out", tmp_path / "run", "--print-peft") == 2
    assert (
        "--full trains all weights: leave one of them out" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
