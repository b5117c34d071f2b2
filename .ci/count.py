"""Counts lines of code, without blanks, comments and docstrings: `python .ci/count.py [folder]`.

Prints the core (what scores, places, trains, saves and runs), the whole, the largest files (raw lines) and the largest
functions (raw lines).
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

# what explains, compares or measures: no run needs it
APART = {"studies", "report", "doctor", "bench", "benchmark", "estimate", "audit", "controls", "criteria", "trial"}
APART |= {
    "trial_runs",
    "arms",
    "paired",
    "search",
    "sections",
    "pictures",
    "page",
    "bench_cases",
    "bench_timing",
    "meter",
}
QUIET = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstrings(tree: ast.AST) -> set[int]:
    """The lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def code_lines(text: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in QUIET:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings(ast.parse(text)))


def main(root: Path) -> None:
    core = whole = raw = 0
    files, functions = [], []
    paths = [*(root / "plopfast").rglob("*.py"), *(root / "kernels").glob("*.py")]
    for path in sorted(path for path in paths if "plopfast/kernels/" not in path.as_posix()):
        name, text = path.relative_to(root), path.read_text()
        count = code_lines(text)
        apart = bool(APART & {*name.with_suffix("").parts})
        core, whole, raw = core + (not apart) * count, whole + count, raw + text.count("\n")
        files.append((text.count("\n"), str(name)))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}"))
    print(f"core {core} lines of code, all {whole} ({raw} raw lines in {len(files)} files)")
    for title, found in ("files", files), ("functions", functions):
        print(f"largest {title}: " + ", ".join(f"{name} {lines}" for lines, name in sorted(found)[:-6:-1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
