"""Do the tests notice faults? Code is broken in several ways, one at a time, and the tests of that part must fail.

    python bench/mutations.py [--only gemm | kernels | rows | template ...]

Works on a copy of the checkout. A mutation replaces one text once. For a kernel, its test file then runs in the checked
interpreter, up to the first failure. For the rows' code, the tests of the case that is broken must fail; whether the matrix
of tokenizers, templates and rows (tests/data/test_labels.py) fails too is recorded beside it. Prints every mutation with
what caught it, and exits with 1 if one survives.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plopfast.support import threads

threads.set_waiting_policy()

import measure

ROOT = Path(__file__).parent.parent
TESTS = {
    "gemm": ["test_gemm.py"], "gemm_tma": ["test_gemm.py"], "shrink": ["test_shrink.py"], "expand": ["test_expand.py"],
    "grads": ["test_grads.py"], "reduce": ["test_reduce.py", "test_gemm.py"], "mask": ["test_mask.py"],
    "nf4": ["test_nf4.py"], "triton_ops": ["test_gemm.py", "test_shrink.py", "test_grads.py", "test_ops_triton.py"],
    "library": ["test_ops_triton.py"],
}  # fmt: skip
# kernel file, what is broken, text, its replacement
MUTATIONS = [
    ("gemm", "rows beyond M are read", "row_M = tl.where(rm < M, rm, 0)", "row_M = rm"),
    ("gemm", "rows beyond M are stored", "mask = (rm < M)[:, None] & (rn < N)[None, :]", "mask = (rm <= M)[:, None] & (rn < N)[None, :]"),
    ("gemm", "columns beyond N are stored", "mask = (rm < M)[:, None] & (rn < N)[None, :]", "mask = (rm < M)[:, None] & (rn <= N)[None, :]"),
    ("gemm", "weight read beyond N", "w_tile = tl.load(w_KN, mask=inside_N, other=0.0)", "w_tile = tl.load(w_KN)"),
    ("gemm", "the last part of K is dropped", "for k in range(0, tl.cdiv(K, BK)):", "for k in range(0, K // BK):"),
    ("gemm", "K's edge is not masked in X", "x_tile = tl.load(x_MK, mask=rk[None, :] < K - k * BK, other=0.0)", "x_tile = tl.load(x_MK)"),
    ("gemm", "norms after the low-rank term", "    if NORMS:  #", "    if LORA:\n        acc = add_low_rank(acc, s, b, row_M, rn, N, ssm, sbn, sbr, dtype, RANK, BR, PRECISION)\n    if NORMS:  #"),
    ("gemm", "norms of the wrong tile", "norms + tile_n.to(tl.int64) * M + rm", "norms + rm"),
    ("gemm", "bias forgotten", "    if BIAS:\n", "    if BIAS and False:\n"),
    ("gemm", "tiles twice and never", "return first + inside % height, inside // height", "return first + inside // height, inside % height"),
    ("gemm", "mask of the wrong columns", "keep_tile(seed, rm, tile_n * BN, threshold, BM, BN)", "keep_tile(seed, rm, 0, threshold, BM, BN)"),
    ("gemm", "low-rank term masked and unmasked", "RANK, BR, LORA and not MASK, BIAS", "RANK, BR, LORA, BIAS"),
    ("gemm", "ranks beyond R are read", "mask=rank[None, :] < RANK, other=0.0)\n            inside", "other=0.0)\n            inside"),
    ("gemm", "only the first chunk of ranks", "for r0 in tl.range(0, RANK, BR, num_stages=1):", "for r0 in tl.range(0, BR, BR, num_stages=1):"),
    ("gemm", "row offsets in 32 bits", "rm = tile_m.to(tl.int64) * BM", "rm = tile_m * BM"),
    ("gemm", "accumulator in the operands' dtype", "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)", "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION).to(dtype).to(tl.float32)"),
    ("gemm_tma", "the last tile is left out", "tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)", "tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN) - 1"),
    ("gemm_tma", "the last part of K is dropped", "tl.cdiv(K, BK)):", "K // BK):"),
    ("gemm_tma", "rows beyond M are read", "row_M = tl.where(rm < M, rm, 0)", "row_M = rm"),
    ("gemm_tma", "mask of the wrong columns", "keep_tile(seed, rm, tile_n * BN,", "keep_tile(seed, rm, tile_m * BN,"),
    ("shrink", "norms after dropout", "x_float = x_MK.to(tl.float32)", "x_float = tl.where(keep_tile(seed0, rm, k0, threshold, BM, BK), x_MK, 0.0).to(tl.float32)"),
    ("shrink", "the part's scale is lost", "(acc0 * scale)", "(acc0)"),
    ("shrink", "second adapter with the first's seed", "acc1, x_MK, a1, rank, rk, K, sar, sak, seed1", "acc1, x_MK, a1, rank, rk, K, sar, sak, seed0"),
    ("shrink", "third adapter is the second", "acc2, x_MK, a2, rank", "acc2, x_MK, a1, rank"),
    ("shrink", "parts overlap", "range(part * k_chunk,", "range(0,"),
    ("shrink", "K's edge is not masked", "mask=inside_M[:, None] & (rk < K)[None, :]", "mask=inside_M[:, None]"),
    ("shrink", "ranks beyond R are stored", "mask = inside_M[:, None] & (rank < RANK)[None, :]", "mask = inside_M[:, None] & (rank <= RANK)[None, :]"),
    ("shrink", "norms of the wrong part", "norms + part.to(tl.int64) * M + rm", "norms + rm"),
    ("expand", "bias forgotten", "    if BIAS:\n", "    if BIAS and False:\n"),
    ("expand", "mask forgotten", "    if MASK:\n", "    if MASK and False:\n"),
    ("expand", "columns beyond N are stored", "(rn < N)[None, :]\n    tl.store", "(rn <= N)[None, :]\n    tl.store"),
    ("expand", "rows beyond M are read", "row_M = tl.where(rm < M, rm, 0)", "row_M = rm"),
    ("grads", "the last rows are dropped", "min(M, first + row_chunk), BM)", "min(M, first + row_chunk) - BM + 1, BM)"),
    ("grads", "parts overlap", "range(first, min(M, first + row_chunk), BM)", "range(first, M, BM)"),
    ("grads", "dropout forgotten in dA", "        if DROP:\n", "        if DROP and False:\n"),
    ("grads", "dS without its scale", "(ds_MR * scale)", "ds_MR"),
    ("grads", "dS of the wrong stripe", "ds + stripe.to(tl.int64) * sds", "ds"),
    ("grads", "gradient of the wrong part", "g + part.to(tl.int64) * sgp", "g"),
    ("grads", "columns beyond C are read", "inside = (rm < M)[:, None] & (rc < C)[None, :]", "inside = (rm < M)[:, None] & (rc <= C)[None, :]"),
    ("grads", "the sum starts anew", "acc = tl.dot(tl.trans(v_MR), t_MC, acc, input_precision=PRECISION)", "acc = tl.dot(tl.trans(v_MR), t_MC, input_precision=PRECISION)"),
    ("reduce", "the first part alone", "partials += size", "partials += 0"),
    ("reduce", "no root", "    if ROOT:\n", "    if ROOT and False:\n"),
    ("reduce", "scale is lost", "    total *= scale\n", ""),
    ("grads", "the right tile with the left one's B", "tl.dot(t_right_MC, u_right_CR, ds_MR", "tl.dot(t_right_MC, u_CR, ds_MR"),
    ("grads", "the right tile's sum where the left one's is", "part, rc + BC, rank, C, sgp", "part, rc, rank, C, sgp"),
    ("reduce", "bias read beyond N", "tl.load(bias + rn, mask=rn < N, other=0.0)", "tl.load(bias + rn)"),
    ("reduce", "columns beyond N are read", "(rn < N)[None, :]", "(rn <= N)[None, :]"),
    ("mask", "halves swapped", "tl.join(words & 0xFFFF, words >> 16)", "tl.join(words >> 16, words & 0xFFFF)"),
    ("mask", "words out of order", "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    ("mask", "six rounds", "zero, 7)", "zero, 6)"),
    ("mask", "high half of the row lost", "zero + high,", "zero,"),
    ("mask", "one level off", ">= threshold", "> threshold"),
    ("nf4", "halves swapped", "(_levels(code & 15, table) * scale).to(dtype)", "(_levels(code >> 4, table) * scale).to(dtype)"),
    ("nf4", "scale of the first block", "        scale_N += 1\n", ""),
    ("nf4", "scale of the next block", "absmax + block, mask", "absmax + block + 1, mask"),
    ("nf4", "wrong half stored", "tl.store(at + 32,", "tl.store(at + 31,"),
    ("nf4", "repacked in bitsandbytes' order", "codes[:, :, 1] << 4 | codes[:, :, 0]", "codes[:, :, 0] << 4 | codes[:, :, 1]"),
    ("triton_ops", "1 / (1 - p) twice", "s = s[0] if splits == 1 else sum_parts(s, c, x_MK.dtype)", "s = s[0] if splits == 1 else sum_parts(s, c * c, x_MK.dtype)"),
    ("triton_ops", "dX with the forward's bias", "low_rank(ds_MR, a_RK.T, p=p, seed=seed)", "low_rank(ds_MR, a_RK.T)"),
    ("triton_ops", "fused dX without its mask", "ds_MR, a_RK.T, p=p, seed=seed, tiles", "ds_MR, a_RK.T, tiles"),
    ("triton_ops", "TMA for what it cannot describe", "or outer * size % 16 or", "or"),
    ("library", "dA although not needed", "    if need_a:\n        da = triton_ops", "    if True:\n        da = triton_ops"),
    ("library", "dX although not needed", "    if need_x:\n        dx = triton_ops", "    if True:\n        dx = triton_ops"),
]  # fmt: skip


MATRIX = ["tests/data/test_labels.py", "-k", "bos-eos"]  # two tokenizers of seven, for the time it takes
CASES = {  # what rows must give, and the tests of it where they are not `test_case_NUMBER` in tests/data/test_label_cases.py
    1: ("special tokens once", []), 2: ("what stands beside messages", []), 3: ("content in parts", []),
    4: ("tool calls without content", []), 5: ("which turns are learned", []), 6: ("assistants alone", []),
    7: ("prompts as at inference", []), 8: ("templates that refuse parts", []), 9: ("nothing to learn", []),
    10: ("rows that cannot be read", ["tests/data/test_readers.py", "tests/support/test_strict_json.py"]), 11: ("string pairs", []),
    12: ("tokens beyond the embedding", ["tests/models/test_models.py", "-k", "beyond_the_embedding"]),
    13: ("long rows", []), 14: ("accuracy without closing markup", []),
}  # fmt: skip
# case, file, what is broken, text, its replacement
ROW_MUTATIONS = [
    (1, "data/labels", "BOS before a text that has it", "if (draft.tokens[0] or [])[: len(front)] != front:", "if True:"),
    (1, "data/labels", "EOS behind a text that has it", "if end and tokens[-len(end) :] == end:", "if False:"),
    (1, "data/labels", "special tokens around a rendered chat", "([], []) if draft.templated else (", "("),
    (1, "data/encoding", "the tokenizer's own EOS is lost", "self.end = self.back or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])", "self.end = []"),
    (2, "data/conversation", "tools are dropped", 'VARIABLES = ("tools", "documents")', 'VARIABLES = ("documents",)'),
    (2, "data/conversation", "documents are dropped", 'VARIABLES = ("tools", "documents")', 'VARIABLES = ("tools",)'),
    (2, "data/conversation", "chat_template_kwargs are dropped", "found[KWARGS] = more", "pass"),
    (2, "data/template", "tools that a template does not show", "if lost := sorted(name for name in names if what in unseen or name not in text):", "if lost := []:"),
    (3, "data/conversation", "the repr of a list of parts", "if isinstance(content, str):\n        return content", "if content is not None:\n        return str(content)"),
    (3, "data/conversation", "parts of other kinds are dropped", "            raise DataError(\n                f\"{place}: a content part", "            continue\n            raise DataError(\n                f\"{place}: a content part"),
    (4, "data/conversation", "a null content stays", "if value is not None and key !=", "if key !="),
    (4, "data/template", "an absent content is refused", "in _with_content, _with_text_arguments:", "in [_with_text_arguments]:"),
    (4, "data/conversation", "arguments stay JSON text", "if isinstance(arguments, str):", "if False:"),
    (4, "data/conversation", "no content and no call", 'raise DataError(f"{place}: has no content and no tool_calls")', 'kept["content"] = ""'),
    (5, "data/template", "the last turn alone", 'numbers[-1:] if learn == "last" else numbers', "numbers[-1:]"),
    (5, "data/template", "all turns for the last one", 'numbers[-1:] if learn == "last" else numbers', "numbers"),
    (5, "data/conversation", "weight 0 is learned", "may_learn.append(learned and not muted[-1])", "may_learn.append(learned)"),
    (5, "data/turns", "the template's marks are not read", "spans = self.template.marked(self.messages, self.variables)", "spans = []"),
    (6, "data/conversation", "users are learned", "learned = message[\"role\"] == ASSISTANT and number >= asked", "learned = number >= asked"),
    (6, "data/turns", "the system prompt of the template is learned", "own = self._own(number)[0]\n        names", "own = 0\n        names"),
    (7, "data/turns", "the prompt's last line break is learned", "return len(prompt)\n", "return len(prompt.rstrip())\n"),
    (7, "data/encoding", "a blank before what follows", "if self._alone:", "if True:"),
    (7, "data/turns", "a prompt that differs is taken", "if prompt is not None and number + 1 == len(self.messages):", "if False:"),
    (8, "data/template", "parts must be accepted", "except Exception:  # many templates", "except ZeroDivisionError:  # many templates"),
    (9, "data/template", "rows without an answer", "if not numbers:\n", "if False:\n"),
    (9, "data/labels", "rows that are skipped are kept quiet", "self.skipped.append(str(made))\n", "pass\n"),
    (10, "support/strict_json", "one of two equal keys is lost", "if len(value) != len(pairs):", "if False:"),
    (10, "support/strict_json", "deep nesting", "if end - begin > 2 * DEEPEST and", "if False and"),
    (10, "support/strict_json", "the parser's own limit of nesting", "except RecursionError:\n            raise ValueError(DEEP)", "except ZeroDivisionError:\n            raise ValueError(DEEP)"),
    (10, "support/strict_json", "long integers", "if len(digits) > self._digits:", "if False:"),
    (10, "support/strict_json", "lone surrogates", 'text.find("\\\\u", begin, end) >= 0 and', "False and"),
    (10, "support/strict_json", "NaN is null", 'self._problem = f"{name} is not JSON; write null or leave the key out"', "pass"),
    (11, "data/labels", "pairs without a word", "self.notices.add(AS_WRITTEN, where, once=True)", "pass"),
    (12, "models/loading", "no check", "    _check_embedding(model, tokenizer)\n", ""),
    (12, "models/loading", "one token too many", "if rows and number >= rows", "if rows and number > rows"),
    (13, "data/lengths", "cut from the right", "return self._without_its_left(example, limit, notices)", "return example.truncated(limit)"),
    (13, "data/lengths", "no error for a long row", "if limit is None or count <= limit:", "if True:"),
    (13, "data/lengths", "skipped without a word", 'notices.add(f"longer than {limit} tokens, so left out (--long skip)", example.where)', "pass"),
    (13, "data/lengths", "an answer is cut", "if limit < keep + 1 + last and", "if False and"),
    (14, "data/labels", "the end of turn counts", "(turn.closing, True, last), (turn.end, True, False)", "(turn.end, True, last)"),
    (14, "data/labels", "no answer to choose", "return Draft(where, _pieces(found), answer,", "return Draft(where, _pieces(found), None,"),
]  # fmt: skip


def run_tests(root: Path, tests: list[str], **environment: str) -> tuple[bool, str]:
    """(whether they pass, the first failure's name and message)"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-rf", *tests]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    said = re.findall(r"^(?:FAILED|ERROR) (tests.*?)(?: - (.*))?$", done.stdout, re.M)
    name, message = said[0] if said else ("", "")
    return done.returncode == 0, f"{re.sub('^tests/(gpu|data)/', '', name)} {message}"[:150]


def run_kernel_tests(root: Path, kernel: str) -> tuple[bool, str]:
    return run_tests(
        root, ["--confcutdir=tests/gpu", *(f"tests/gpu/{name}" for name in TESTS[kernel])], TRITON_INTERPRET="1"
    )


def tests_of(case: int) -> list[str]:
    return CASES[case][1] or ["tests/data/test_label_cases.py", "-k", f"case_{case}_"]


@contextlib.contextmanager
def broken(path: Path, old: str, new: str) -> Iterator[None]:
    text = path.read_text()
    assert old in text, f"{path.stem}: {old!r} is not there (any more)"
    path.write_text(text.replace(old, new, 1))
    yield
    path.write_text(text)


def break_kernels(root: Path, chosen: list[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    for kernel in dict.fromkeys(m[0] for m in chosen):
        passed, said = run_kernel_tests(root, kernel)
        assert passed, f"{kernel}: its tests are red before any mutation: {said}"
    rows = []
    for kernel, what, old, new in chosen:
        began = time.perf_counter()
        with broken(root / "kernels" / f"{kernel}.py", old, new):
            survived, said = run_kernel_tests(root, kernel)
        row = f"{kernel:<11}{what:<40}{'SURVIVED' if survived else 'caught'}  {said}"
        print(f"{row}  ({time.perf_counter() - began:.0f} s)", flush=True)
        rows.append({"kernel": kernel, "broken": what, "caught": not survived, "by": said})
    return rows


def break_rows(root: Path, chosen: list[tuple[int, str, str, str, str]]) -> list[dict[str, Any]]:
    for tests in [MATRIX, *(tests_of(case) for case in dict.fromkeys(m[0] for m in chosen))]:
        passed, said = run_tests(root, tests)
        assert passed, f"{tests}: red before any mutation: {said}"
    rows = []
    for case, file, what, old, new in chosen:
        began = time.perf_counter()
        with broken(root / "plopfast" / f"{file}.py", old, new):
            survived, said = run_tests(root, tests_of(case))
            unseen, matrix = run_tests(root, MATRIX)
        row = f"{case:>2} {file.split('/')[1]:<13}{what:<46}{'SURVIVED' if survived else 'caught'}  {said}"
        print(f"{row}  matrix: {'green' if unseen else 'red'} ({time.perf_counter() - began:.0f} s)", flush=True)
        found = {"caught": not survived, "by": said, "matrix": not unseen, "matrix_by": matrix}
        rows.append({"case": case, "file": file, "broken": what, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a file's name, kernels or rows")
    only = parser.parse_args().only
    kernels = [m for m in MUTATIONS if only in (None, "kernels", m[0])]
    rows = [m for m in ROW_MUTATIONS if only in (None, "rows", m[1].split("/")[1])]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "plopfast"
        for part in ("plopfast", "kernels", "tests"):
            shutil.copytree(ROOT / part, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        of_kernels, of_rows = break_kernels(root, kernels), break_rows(root, rows) if rows else []
    if len(kernels) == len(MUTATIONS):
        lines = [f"{r['kernel']:<11}{r['broken']:<40}{r['by'].split(' ')[0] or 'SURVIVED'}" for r in of_kernels]
        lines.append(f"{sum(r['caught'] for r in of_kernels)} of {len(of_kernels)} mutations caught")
        measure.save("mutations", "\n".join(lines), {"mutations": of_kernels})
    if len(rows) == len(ROW_MUTATIONS):
        cases = [f"{r['case']:>2} {CASES[r['case']][0]}: {r['broken']}" for r in of_rows]
        ends = [f"{r['by'].split(' ')[0] if r['caught'] else 'SURVIVED'}{', matrix' * r['matrix']}" for r in of_rows]
        lines = [f"{case:<80}{end}" for case, end in zip(cases, ends, strict=True)]
        lines.append(f"{sum(r['caught'] for r in of_rows)} of {len(of_rows)} mutations caught")
        measure.save("mutations_rows", "\n".join(lines), {"mutations": of_rows})
    sys.exit(not all(r["caught"] for r in [*of_kernels, *of_rows]))


if __name__ == "__main__":
    main()
