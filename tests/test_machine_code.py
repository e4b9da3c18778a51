"""What `bench.aot` reads from machine code and predicts from it, on listings small enough to count by hand."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benches are in no package that is installed

from bench import _accesses, _machine_code, _roofline, aot  # noqa: E402

sys.path.remove(str(ROOT))  # where `kernels` would pass for another project's package

# Two tile loops (the second compares besides), a wait for a barrier that is moved out of the first one, a loop without
# matrix instructions at the end, and a jump by CALL as ptxas writes it.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR8][R4.64] ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R6 ;
        /*0040*/              @!P1 BRA `(.L_x_5) ;
.L_x_6:
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8.reuse, R12, R4 ;
        /*0060*/                   FFMA R9, R9, UR5, -R10 ;
        /*0070*/                   MUFU.EX2 R9, R9 ;
        /*0080*/                   IADD3 R3, R3, 0x40, RZ ;
        /*0090*/                   BRA.U !UP1, `(.L_x_0) ;
.L_x_1:
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00b0*/                   FFMA R9, R9, UR5, -R10 ;
        /*00c0*/                   ISETP.GE.AND P0, PT, R3, R5, PT ;
        /*00d0*/                   ISETP.GE.AND P2, PT, R3, R6, P0 ;
        /*00d8*/                   PLOP3.LUT P2, PT, P2, P4, PT, 0x80, 0x0 ;
        /*00e0*/                   FSEL R9, R9, -INF, P2 ;
        /*00f0*/                   MUFU.EX2 R9, R9 ;
        /*0100*/                   SHFL.BFLY PT, R7, R9, 0x1, 0x1f ;
        /*0110*/               @P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0120*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0130*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0140*/              @!P3 BRA `(.L_x_2) ;
        /*0150*/                   EXIT ;
.L_x_5:
        /*0160*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R6 ;
        /*0170*/              @!P1 BRA `(.L_x_5) ;
        /*0180*/                   BRA `(.L_x_6) ;
.L_x_7:
        /*0190*/                   BRA `(.L_x_7);
"""
AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
\ts_cbranch_scc1 .LBB0_3
; %bb.1:                                ; %.lr.ph
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 64 20                         ; attend_forward.py:64:20
\tbuffer_load_dwordx4 v[2:5], v13, s[40:43], 0 offen
\tds_read_b128 v[6:9], v1
\ts_waitcnt lgkmcnt(0)
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[6:7], v[8:9], v[0:15]
\tv_fma_f32 v1, v2, v3, v4
\tv_exp_f32_e32 v1, v1
\tv_lshlrev_b32_e32 v1, 16, v1
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
\tbuffer_store_dword v1, v2, s[0:3], 0 offen
\ts_endpgm
"""


def test_the_loop_over_full_tiles_is_found_in_sass() -> None:
    work = _machine_code.work(SASS)
    assert work.is_loop
    # .L_x_0 to its BRA.U with the way back from the wait, but not the wait that turns
    assert work.classes == {"mma": 1, "exp": 1, "float": 1, "integer": 1, "memory": 1, "other": 4}
    assert work.matrix_flops == 2 * 16 * 8 * 16


def test_a_jump_by_call_leaves_a_loop() -> None:
    """Without the first loop the masked one is what there is, and it does not go on to the loop behind it."""
    masked = SASS.replace("HMMA", "NOP", 1).replace("MUFU.EX2", "NOP", 1)
    assert _machine_code.work(masked).classes == {
        "mma": 1, "exp": 1, "float": 2, "integer": 3, "memory": 1, "other": 2,
    }  # fmt: skip


def test_exponentials_stand_for_matrix_instructions_where_there_are_none() -> None:
    work = _machine_code.work(SASS.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert work.is_loop and work.classes["float"] == 2 and work.classes["exp"] == 1
    assert work.matrix_flops is None


def test_the_loop_is_found_in_amdgcn() -> None:
    work = _machine_code.work(AMDGCN)
    assert work.is_loop
    assert work.classes == {"mma": 2, "exp": 1, "float": 1, "integer": 1, "memory": 2, "other": 2}
    assert work.matrix_flops == 2 * 2 * 32 * 32 * 8
    assert work.global_bytes == 16


def test_a_kernel_without_a_loop_is_its_longest_way() -> None:
    work = _machine_code.work("""
        /*0000*/               @P0 BRA `(.L_x_0) ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   LDG.E.U16 R4, desc[UR8][R2.64] ;
        /*0050*/                   EXIT ;
""")
    assert not work.is_loop
    assert work.names == Counter({"BRA": 1, "LDG.E.128.CONSTANT": 1, "STG.E.128": 1, "EXIT": 1})
    assert work.global_bytes == 32


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x128x16.F32.BF16", "mma"), ("UTCHMMA.2CTA", "mma"), ("v_mfma_f32_16x16x16_f16", "mma"),
        ("MUFU.EX2", "exp"), ("v_exp_f32_e32", "exp"), ("FMNMX3", "float"), ("FENCE.VIEW.ASYNC.S", "other"),
        ("HFMA2.MMA", "float"), ("F2FP.BF16.F32.PACK_AB", "float"), ("v_pk_mul_f32", "float"), ("UIADD3", "integer"),
        ("R2UR", "integer"), ("IMAD.WIDE", "integer"), ("v_perm_b32", "integer"), ("LDTM.x64", "memory"),
        ("UTMALDG.2D", "memory"), ("LDS.128", "memory"), ("ds_read_b128", "memory"), ("LDGDEPBAR", "other"),
        ("LDC.64", "other"), ("UTCBAR", "other"), ("BAR.SYNC.DEFER_BLOCKING", "other"), ("s_waitcnt", "other"),
    ],
)  # fmt: skip
def test_classes(name: str, kind: str) -> None:
    assert _machine_code.class_of(name) == kind


@pytest.mark.parametrize(
    ("gpu", "fit", "blocks"),
    [
        ("sm_90", dict(warps=4, registers=32, shared=0), 16),  # 64 warps
        ("sm_90", dict(warps=4, registers=255, shared=0), 2),  # 256 registers each: 2 warps per partition
        ("sm_90", dict(warps=8, registers=168, shared=0), 1),  # 3 warps per partition, 12 in all
        ("sm_90", dict(warps=8, registers=128, shared=100 << 10), 2),
        ("sm_90", dict(warps=8, registers=128, shared=114 << 10), 1),  # the driver's KiB is one too many
        ("sm_90", dict(warps=1, registers=16, shared=0), 32),
        ("sm_90", dict(warps=16, registers=255, shared=0), 0),
        ("sm_80", dict(warps=4, registers=128, shared=40 << 10), 4),
        ("sm_100", dict(warps=4, registers=64, shared=0, tensor_memory=256), 2),
        ("gfx942", dict(warps=4, registers=128, shared=0), 4),
        ("gfx942", dict(warps=4, registers=284, shared=32 << 10), 1),  # LLVM's "Occupancy: 1" for 284
        ("gfx942", dict(warps=8, registers=249, shared=32 << 10), 1),  # 2 waves per SIMD
    ],
)
def test_occupancy(gpu: str, fit: dict[str, int], blocks: int) -> None:
    assert _roofline.blocks(_roofline.GPUS[gpu], **fit) == blocks


def test_the_worked_example_of_the_prediction() -> None:
    names = {"HGMMA.64x128x16": 16, "MUFU.EX2": 66, "FFMA": 300, "IADD3": 98, "LDS": 31, "BAR": 40}
    work = _machine_code.Work(Counter(names), True)
    flops = 2 * 128 * 128 * 256
    assert 8 * work.matrix_flops == flops
    low, high = _roofline.share_of_peak(_roofline.GPUS["sm_90"], work, 8, flops, flops, 2)
    assert low == pytest.approx(2048 / (2048 + 1056 + 1102)) and high == 1
    # half of the operations asked for by nobody
    assert _roofline.share_of_peak(_roofline.GPUS["sm_90"], work, 8, flops // 2, flops, 2)[1] == 0.5


def test_limits_of_a_block_are_those_of_the_manuals() -> None:
    limits = {name: gpu.shared_per_block >> 10 for name, gpu in _roofline.GPUS.items()}
    assert limits == {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def test_peaks_are_those_of_the_datasheets() -> None:
    tera = {n: gpu.processors * gpu.clock * gpu.flops[2] / 1e3 for n, gpu in _roofline.GPUS.items()}
    assert tera == pytest.approx({"sm_80": 312, "sm_90": 989.4, "sm_100": 2250, "gfx942": 1307.4}, rel=5e-3)


GOOD = aot.Report(
    kernel="attend_dq_kernel", target="sm_100", wanted_mma="tcgen05.mma", warps=8, registers=200, spill_stores=0,
    spill_loads=0, shared=227 << 10, tensor_memory=512, mma=("tcgen05.mma",), tma=3, accesses={"ld.global.v4.b32": 4},
    scalar_rows={}, instructions=dict.fromkeys(_machine_code.CLASSES, 1), is_loop=True, blocks=1,
    share=(0.4, 0.9), waste=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(), None),
        (dict(shared=(227 << 10) + 1), "232449 bytes of shared memory, 232448 are there"),
        (dict(tensor_memory=1024), "1024 columns of tensor memory, 512 are there"),
        (dict(blocks=0), "8 warps with 200 registers per thread do not fit"),
        (dict(mma=("mma.sync",)), "no tcgen05.mma"),
        (dict(mma=(), wanted_mma=None), None),  # fp32
        (dict(tma=0), "no TMA for rows that descriptors describe"),
        (dict(tma=None), None),  # rows are read by pointers
        (dict(spill_stores=1), "1 spills, 0 allowed"),
        (dict(spill_stores=8, kernel="attend_dkv_kernel"), None),
        (dict(spill_stores=9, kernel="attend_dkv_kernel"), "9 spills, 8 allowed"),
        (dict(scalar_rows={"ld.global.b16 at _rows.py:48": 2}), "scalar ld.global.b16 at _rows.py:48 x2"),
    ],
)
def test_faults(change: dict, fault: str | None) -> None:
    report = replace(GOOD, **change)
    assert report.faults() == ([fault] if fault else [])
    assert ("FAULT" in aot.row("case", report)) == bool(fault)


def test_scalar_accesses_of_rows_are_told_from_those_of_one_number_per_row() -> None:
    ttir = """
#loc1 = loc("/somewhere/kernels/_rows.py":48:23)
#loc2 = loc("/somewhere/kernels/attend.py":109:20)
#loc3 = loc("/somewhere/kernels/attend.py":63:67)
#loc4 = loc(callsite(#loc1 at #loc3))
#loc5 = loc("b_lse"(#loc2))
    %b_k = tt.load %ptrs : tensor<64x128x!tt.ptr<bf16>> loc(#loc4)
    %b_lse = tt.load %ptrs_1, %mask, %other : tensor<64x!tt.ptr<f32>> loc(#loc5)
"""
    ptx = """
	.loc	4 48 23                         // _rows.py:48:23 @[ attend.py:63:67 ]
	@%p2 ld.global.v4.b32 { %r74, %r75, %r76, %r77 }, [ %rd50 + 0 ];
	@%p2 {} {{ %r74 }}, [ %rd50 + 0 ];
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
	.loc	1 109 20                        // attend.py:109:20
	@%p10 ld.global.b32 {{ %r154 }}, [ %rd66 + 0 ];
"""
    for name in ("ld.global.b16", "ld.global.b32"):  # a vector of two bf16 would be one, too
        assert _accesses.scalar_rows(ptx.replace("{} {{", name + " {"), ttir) == {f"{name} at _rows.py:48": 1}
    assert _accesses.scalar_rows(ptx.replace("{} {{", "ld.global.v2.b64 {"), ttir) == {}
    nowhere = "\tbuffer_load_ushort v1, v2, s[0:3], 0 offen"
    assert _accesses.scalar_rows(nowhere, ttir) == {"buffer_load_ushort at an unknown line": 1}


def test_a_record_has_the_worst_of_every_kernel() -> None:
    bad = replace(GOOD, registers=GOOD.registers + 7, spill_stores=99, share=(0.1, 0.2))
    (found,) = aot.summary([("other", bad), (f"{aot.PLAIN} backward", GOOD)])
    assert (found["case"], found["kernel"], found["compiled"]) == (GOOD.target, GOOD.kernel, 2)
    assert found["registers"] == (GOOD.registers, bad.registers) and found["spills"] == 99
    assert found["share"] == GOOD.share and found["faults"] == 1 and not found["ok"]
