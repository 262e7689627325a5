"""Figures read from machine code, against snippets small enough to count by hand; and a real kernel, compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_budgets.compile_ahead import Compiled
from benchmarks.kernel_budgets.control_flow import loops
from benchmarks.kernel_budgets.machine_code import figures, load_bits
from benchmarks.kernel_budgets.occupancy import resident

SASS = """
.text.kernel:
        LOP3.LUT R0, R0, 0x3, RZ, 0xc0, !PT ;
   @!P0 BRA `(.L_x_2) ;
.L_x_1:
        LDGSTS.E.BYPASS.LTC128B.128 [R4], [R8.64] ;
   @P2  LDGSTS.E.BYPASS.LTC128B.128 [R4], [R8.64] ;
        LDGSTS.E.LTC128B.64 [R4], [R8.64] ;
        LDG.E.U8 R3, [R2.64] ;
        LDG.E R3, [R2.64] ;
        LDSM.16.M88.4 R12, [R20+0x100] ;
        LOP3.LUT R1, R14, 0xf0f0f0f, RZ, 0xc0, !PT ;
        IMAD.SHL.U32 R2, R1, 0x10, RZ ;
        PRMT R2, R15, 0x10, RZ ;
        IMAD R2, R15, 0x10, RZ ;
        SHF.R.S32.HI R3, RZ, 0x1f, R3 ;
        LOP3.LUT R5, R6, 0x3f, RZ, 0xc0, !PT ;
        IMMA.16832.S8.S8.SAT R88, R24.reuse.ROW, R56.COL, R20 ;
        IMMA.16832.S8.S8.SAT R88, R24.reuse.ROW, R56.COL, R20 ;
   @P1  BRA `(.L_x_1) ;
        STL [R1], R0 ;
        LDL R0, [R1] ;
.L_x_2:
        EXIT ;
.L_x_3:
        BRA `(.L_x_3);
"""
AMDGCN = """
.LBB0_1:                                ; %.lr.ph
	buffer_load_dwordx4 v[32:35], v32, s[24:27], 0 offen
	global_load_ushort v3, v[2:3], off
	v_and_b32_e32 v5, 0xf0f0f0f, v33
	v_and_b32_e32 v5, 0xf0f0f0f, v3
	v_mfma_i32_32x32x16_i8 v[16:31], v[52:53], v[54:55], v[16:31]
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	v_mfma_i32_32x32x16_i8 v[16:31], v[52:53], v[54:55], v[16:31]
	v_mfma_i32_32x32x16_i8 v[16:31], v[52:53], v[54:55], v[16:31]
	s_endpgm
.LBB0_3:
	s_cbranch_scc0 .LBB0_2
	s_endpgm
    .vgpr_spill_count: 7
"""


def test_a_loop_of_sass():
    found = figures(Compiled("kernel", "sm_90", SASS, registers=121, shared=88 * 1024, threads=256), weights=8 * 128)
    assert (found.mma, found.mmas, found.instructions) == ("IMMA.16832.S8.S8", 2, 15)
    assert found.logic == 3 * 256 / 128
    assert (found.byte_shuffles, found.spills) == (1, 2)
    assert (found.wide_loads, found.narrow_loads, found.scale_loads) == (2, 1, 2)
    assert found.ctas == 2


def test_a_loop_of_amdgcn_and_a_jump_back_that_is_none():
    found = figures(Compiled("kernel", "gfx942", AMDGCN, registers=128, shared=16384, threads=256), weights=8 * 256)
    assert (found.mma, found.mmas, found.instructions, found.logic) == ("v_mfma_i32_32x32x16_i8", 1, 6, 1.0)
    assert (found.wide_loads, found.narrow_loads, found.scale_loads, found.spills) == (1, 0, 1, 7)


def test_without_a_loop_all_code_counts():
    found = figures(Compiled("kernel", "sm_80", "LDG.E.64 R2, [R4] ;\nEXIT ;", 32, 0, 128), weights=0)
    assert (found.mma, found.instructions, found.narrow_loads, found.logic) == ("", 2, 1, 0.0)


def test_the_inner_of_two_loops():
    code = [".L_0:", "A", ".L_1:", "B", "@P0 BRA `(.L_1)", "C", "@P1 BRA `(.L_0)", "EXIT"]
    assert sorted(loops(code), key=len) == [
        ["B", "@P0 BRA `(.L_1)"],
        ["A", "B", "@P0 BRA `(.L_1)", "C", "@P1 BRA `(.L_0)"],
    ]


def test_a_branch_on_a_uniform_predicate_may_fall_through():
    assert loops([".L_0:", "A", "BRA.U !UP0, `(.L_1)", "B", "BRA `(.L_0)", ".L_1:", "EXIT"]) == [
        ["A", "BRA.U !UP0, `(.L_1)", "B", "BRA `(.L_0)"]
    ]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32), ("LDG.E.U8", 8), ("LDG.E.64.CONSTANT", 64), ("LDGSTS.E.BYPASS.LTC128B.128", 128),
        ("LDGSTS.E.LTC128B.64", 64), ("LDGSTS.E.LTC128B", 32), ("UTMALDG.2D", 128),
        ("buffer_load_dwordx4", 128), ("global_load_sbyte_d16", 8), ("global_load_dword", 32),
    ],
)  # fmt: skip
def test_bits_of_loads(name, bits):
    assert load_bits(name) == bits


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "ctas"),
    [
        ("sm_90", 121, 88 << 10, 256, 2),  # 228 KB hold two times 89, 64 K registers two times 128 · 256
        ("sm_90", 216, 88 << 10, 256, 1),  # registers
        ("sm_80", 128, 72 << 10, 256, 2),
        ("sm_89", 128, 72 << 10, 256, 1),  # 100 KB of shared memory
        ("sm_80", 32, 54 << 10, 256, 2),  # 164 KB, and one more for each CTA
        ("sm_89", 32, 0, 32, 24),  # CTAs
        ("sm_80", 33, 0, 1024, 1),  # 40 registers each: 48 warps
        ("sm_80", 255, 0, 512, 0),
        ("gfx942", 128, 32 << 10, 256, 2),
        ("gfx942", 256, 16 << 10, 256, 2),  # two waves a SIMD
    ],
)
def test_ctas_of_an_sm(arch, registers, shared, threads, ctas):
    assert resident(arch, registers, shared, threads) == ctas


COMPILE = """
import json, torch, triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from benchmarks.kernel_budgets.compile_ahead import compile_only

@triton.jit
def twice(x_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < size) * 2, mask=at < size)

run, active = JITFunction.run, driver._active
x, found = torch.empty(1024, device="meta"), {}
for arch in ("sm_80", "sm_100", "gfx942"):
    with compile_only(arch) as compiled:
        for size in (1024, 1023):
            twice[(1,)](x, size, BLOCK=256, num_warps=2, enable_fp_fusion=True)
    found[arch] = [(kernel.name, kernel.threads, kernel.registers, kernel.code) for kernel in compiled]
assert JITFunction.run is run and driver._active is active
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A kernel as it is launched with 1024 and 1023 elements, compiled in a process without the interpreter."""
    directory = tmp_path_factory.mktemp("ahead")
    (directory / "script.py").write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_HOME"] = str(directory)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])  # where benchmarks/ is
    done = subprocess.run([sys.executable, directory / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout)


@pytest.mark.parametrize(("arch", "warp"), [("sm_80", 32), ("sm_100", 32), ("gfx942", 64)])
def test_what_a_launcher_launches_is_compiled(compiled, arch, warp):
    for name, threads, registers, code in compiled[1][arch]:
        assert (name, threads) == ("twice", 2 * warp)
        assert 2 <= registers <= 32 and code.count("\n") > 10


def test_arguments_are_specialized_as_in_a_launch(compiled):
    widths = [
        figures(Compiled("twice", "sm_80", code, registers, 0, 64), 0) for *_, registers, code in compiled[1]["sm_80"]
    ]
    assert [(found.wide_loads, found.scale_loads) for found in widths] == [(1, 0), (0, 4)]


def test_nothing_stays_in_the_cache(compiled):
    assert {path.name for path in compiled[0].iterdir()} == {"script.py"}
