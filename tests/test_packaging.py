"""plopfast is whole from a wheel, an sdist, an editable install and a bare checkout; nothing is named `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import pathlib, plopfast, plopfast.kernels.reference, plopfast.data.rows
folder = pathlib.Path(plopfast.__file__).resolve().parent
assert all(p.is_file() for p in [*plopfast.data.rows.DEMO.values(), *(folder / "report" / name for name in ("page.html.j2", "figures.html.j2", "style.css.j2", "style_small.css.j2", "studied.json"))])
print(folder)
"""
NO_KERNELS = "import importlib.util as u; assert u.find_spec('kernels') is None, u.find_spec('kernels')"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, links kept, so that building leaves nothing here."""
    target = tmp_path_factory.mktemp("checkout") / "plopfast"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", checkout, "-w", out, "--no-deps", "--no-build-isolation")
    return next(out.glob("*.whl"))


def pip(*arguments, python=sys.executable):
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        *map(str, arguments),
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run(command, check=True, capture_output=True)


def fresh_environment(folder):
    """Make a new environment that sees this one's packages (torch and others), but not its plopfast."""
    venv.create(folder, symlinks=True, with_pip=False)
    outer = folder / "outer"
    outer.mkdir()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.lower().startswith(("plopfast", "__editable__")):
            (outer / package.name).symlink_to(package)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outer.pth").write_text(f"{outer}\n")
    return folder / "bin" / "python"


def run(python, code, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(python), "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_plopfast_alone(wheel, checkout):
    names = zipfile.ZipFile(wheel).namelist()
    here = {path.relative_to(checkout).as_posix() for path in (checkout / "plopfast").glob("**/*.*") if path.is_file()}
    here |= {f"plopfast/kernels/{path.name}" for path in (checkout / "kernels").glob("*.py")}
    assert {name for name in names if ".dist-info" not in name} == here
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"plopfast"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_sdist_builds_the_same_wheel(wheel, checkout, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # from Python 3.11.4 on
    pip("wheel", next(tmp_path.glob("plopfast-*/")), "-w", tmp_path, "--no-deps", "--no-build-isolation")
    built = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert sorted(built.namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_from_a_wheel(wheel, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    pip("install", "--no-deps", "--ignore-installed", wheel, python=python)
    assert (tmp_path / "venv") in Path(run(python, CHECK, tmp_path)).parents
    run(python, NO_KERNELS, tmp_path)


def test_from_an_editable_install(checkout, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", checkout, python=python)
    assert Path(run(python, CHECK, tmp_path)) == (checkout / "plopfast").resolve()
    run(python, NO_KERNELS, tmp_path)


def test_from_an_uninstalled_checkout(checkout, tmp_path):
    code = "import sys; sys.path.insert(0, '.')\n" + CHECK
    assert Path(run(sys.executable, code, checkout)) == (checkout / "plopfast").resolve()


def test_transformers_imports_from_the_checkouts_root(checkout):
    code = "import sys; sys.path.insert(0, '.')\nimport transformers\nfrom transformers import LlamaForCausalLM, AutoModelForCausalLM"
    run(sys.executable, code, checkout)


def test_the_gate_pins_what_the_package_names():
    """Everything that `.[all,dev]` asks for has one version in the constraints that README's commands use."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    asked = project["dependencies"] + [
        need for extra in ("hf", "report", "search", "data", "dev") for need in optional[extra]
    ]
    name = re.compile(r"^([\w-]+)", re.MULTILINE)
    pinned = {
        found[1].lower() for found in re.finditer(r"^([\w-]+)==", (ROOT / ".ci/constraints.txt").read_text(), re.M)
    }
    assert {name.match(need)[1].lower() for need in asked} <= pinned
