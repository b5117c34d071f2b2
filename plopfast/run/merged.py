"""What `plopfast merge` says: the files that it wrote, how far merging moved the logits, and how other programs serve the folder."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

NEEDS = {"nf4": "bitsandbytes", "int8": "bitsandbytes"}  # what reads such codes
SMALLEST = 0.05  # MiB; smaller files are counted together


@dataclass(frozen=True)
class Merged:
    """A merged model's folder. `drift`: ||merged logits - adapted logits|| / ||adapted logits||. `codes`: in words, what the weights
    were in the training, if codes; `kept`: the kind of codes that they were written as, if any."""

    folder: Path
    drift: float
    codes: str = ""
    kept: str | None = None

    @property
    def files(self) -> dict[str, int]:
        """Name -> bytes, the largest first."""
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in found.items()}
        return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))

    def serving(self) -> dict[str, str]:
        """Program -> the line that loads or serves the folder, or why there is none."""
        path = str(self.folder)
        quoted, literal = shlex.quote(path), json.dumps(path, ensure_ascii=False)
        convert = f"python convert_hf_to_gguf.py {quoted} --outfile {shlex.quote(f'{path}.gguf')}"
        if self.kept:
            convert = f"its converter takes no {self.kept} codes: merge without --requantize"
        needs = f"  # pip install {NEEDS[self.kept]}" if self.kept in NEEDS else ""
        return {
            "transformers": f"model, tokenizer = AutoModelForCausalLM.from_pretrained({literal}), AutoTokenizer.from_pretrained({literal})",
            "vLLM": f"vllm serve {quoted}{needs}",
            "llama.cpp": convert,
        }

    def __str__(self) -> str:
        mib = {name: size / 2**20 for name, size in self.files.items()}
        large = [f"{name} {size:.1f} MiB" for name, size in mib.items() if size >= SMALLEST]
        small = [name for name, size in mib.items() if size < SMALLEST]
        lines = [
            f"{self.folder}: {len(mib)} files, {sum(mib.values()):.1f} MiB",
            f"  {', '.join([*large, *small])}",
            f"drift: the logits moved by {self.drift:.1g} of their norm, by rounding{' to codes' if self.kept else ''}",
        ]
        if self.codes and not self.kept:
            lines.append(f"the model kept {self.codes}: all of its weights are dense now")
        return "\n".join(
            [*lines, "to serve it:", *(f"  {program:<13} {line}" for program, line in self.serving().items())]
        )
