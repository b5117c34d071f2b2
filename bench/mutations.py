"""Do the kernel tests notice faults? Each kernel is broken in several ways, one at a time, and its tests must fail.

    python bench/mutations.py [--only gemm]

Works on a copy of the checkout. A mutation replaces one text once. The test files of its kernel then run in the checked
interpreter, up to the first failure. Prints every mutation with what caught it, and exits with 1 if one survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def run_tests(root: Path, kernel: str) -> tuple[bool, str]:
    """(whether they pass, the first failure's name and message)"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    files = [str(Path("tests/gpu") / name) for name in TESTS[kernel]]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "--tb=line", "-rf"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    said = re.findall(r"^(?:FAILED|ERROR) (tests.*?)(?: - (.*))?$", done.stdout, re.M)
    name, message = said[0] if said else ("", "")
    return done.returncode == 0, f"{name.removeprefix('tests/gpu/')} {message}"[:150]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a kernel file's name")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only in (None, m[0])]
    rows, survivors = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "plopfast"
        for part in ("plopfast", "kernels", "tests"):
            shutil.copytree(ROOT / part, root / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        for kernel in dict.fromkeys(m[0] for m in chosen):
            passed, said = run_tests(root, kernel)
            assert passed, f"{kernel}: its tests are red before any mutation: {said}"
        for kernel, what, old, new in chosen:
            path = root / "kernels" / f"{kernel}.py"
            text = path.read_text()
            assert old in text, f"{kernel}: {old!r} is not there (any more)"
            path.write_text(text.replace(old, new, 1))
            began = time.perf_counter()
            survived, said = run_tests(root, kernel)
            path.write_text(text)
            survivors += survived
            row = f"{kernel:<11}{what:<40}{'SURVIVED' if survived else 'caught'}  {said}"
            print(f"{row}  ({time.perf_counter() - began:.0f} s)", flush=True)
            rows.append({"kernel": kernel, "broken": what, "caught": not survived, "by": said})
    if arguments.only is None:
        lines = [f"{r['kernel']:<11}{r['broken']:<40}{r['by'].split(' ')[0] or 'SURVIVED'}" for r in rows]
        lines.append(f"{len(rows) - survivors} of {len(rows)} mutations caught")
        measure.save("mutations", "\n".join(lines), {"mutations": rows})
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
