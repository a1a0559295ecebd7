//! Products of pairs of `bf16` in the tiles of AMX: 32 rows by 32 columns at a time, in tile registers of 16 rows of 64 bytes.
//!
//! ```text
//!                               half of a panel: 32 columns
//!                             +-----------+-----------+
//!             16 steps (pairs)| tmm6  b   | tmm7  b   |
//!                             +-----------+-----------+
//!   tmm4  16 rows of a        | tmm0  sum | tmm1  sum |
//!   tmm5  16 rows more        | tmm2  sum | tmm3  sum |
//!                             +-----------+-----------+
//! ```
//!
//! All eight tiles are always whole. What does not fill a block goes through memory of its own, filled up with zeros: left
//! operands of fewer rows or steps, and those whose steps do not lie side by side; the last steps of a panel; sums of fewer
//! rows or columns. So a row's result does not depend on the rows beside it. [Intel SDM, volume 2, TDPBF16PS]

#[cfg(all(test, target_os = "linux"))]
pub(crate) mod emulator;

use std::arch::asm;
use std::cell::RefCell;

use crate::bf16::turn_pairs;
use crate::matmul::{MatrixMut, Target};
use crate::tiles::{DEPTH, Left, Right};

/// Rows of a tile, and pairs or sums in one of its rows.
const TILE: usize = 16;
/// Rows and columns of a block of sums.
const BLOCK: usize = 2 * TILE;

/// What [`load_configuration`] reads: palette 1, and 16 rows of 64 bytes for each of the eight tiles.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const WHOLE_TILES: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Memory for what does not fill a block.
#[repr(align(64))]
struct Scratch {
    left: [u32; BLOCK * DEPTH],
    right: [u32; TILE * BLOCK],
    sums: [f32; BLOCK * BLOCK],
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> =
        RefCell::new(Box::new(Scratch { left: [0; BLOCK * DEPTH], right: [0; TILE * BLOCK], sums: [0.0; BLOCK * BLOCK] }));
}

/// Asks the system for the right to use tiles, which a process needs once; returns whether it has it.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call")]
pub(crate) fn permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM`, and the number of the tiles' state. [arch/x86/include/uapi/asm/prctl.h]
    const REQUEST: (libc::c_int, libc::c_ulong) = (0x1023, 18);
    // SAFETY: the call reads two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST.0, REQUEST.1) == 0 }
}

/// Elsewhere nothing grants it.
#[cfg(not(target_os = "linux"))]
pub(crate) fn permitted() -> bool {
    false
}

/// `out = left * right`, or `out += left * right`, block by block.
///
/// # Safety
/// The processor has AMX with `bf16`, and the process may use it.
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
pub(crate) unsafe fn multiply(out: MatrixMut<'_>, target: Target, left: Left<'_, u32>, right: Right<'_, u32>) {
    right.check(&out, &left);
    let width = right.width.columns();
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: the configuration is one of palette 1; the tiles are released below, and nothing in between panics after
        // it has been loaded but for a broken size, which ends the product.
        unsafe { load_configuration(&WHOLE_TILES) };
        for from in (0..left.steps).step_by(DEPTH) {
            let steps = DEPTH.min(left.steps - from);
            let (whole, rest) = (steps / TILE * TILE, steps % TILE);
            let add = target == Target::Add || from > 0;
            for row in (0..out.rows).step_by(BLOCK) {
                let rows = BLOCK.min(out.rows - row);
                let source = &left.data[row * left.row + from * left.step..];
                let (a, a_row) = if left.step == 1 && rows == BLOCK && rest == 0 {
                    (source.as_ptr(), left.row)
                } else {
                    copy_left(source, left, (rows, steps), &mut scratch.left);
                    (scratch.left.as_ptr(), DEPTH)
                };
                for first in (0..out.columns).step_by(BLOCK) {
                    let columns = BLOCK.min(out.columns - first);
                    let panel = &right.panels[first / width * width * right.steps..][..width * right.steps];
                    let b = &panel[(right.first + from) * width + first % width..];
                    let sums = &mut out.data[row * out.row_stride + first..];
                    let is_whole = rows == BLOCK && columns == BLOCK;
                    if !is_whole && add {
                        copy_rows((sums, out.row_stride), (&mut scratch.sums, BLOCK), rows, columns);
                    }
                    let (to, to_row) =
                        if is_whole { (sums.as_mut_ptr(), out.row_stride) } else { (scratch.sums.as_mut_ptr(), BLOCK) };
                    let mut block =
                        Block { out: to, out_row: to_row, a, a_row, b: b.as_ptr(), b_row: width, tiles: whole / TILE, add };
                    // SAFETY: `to` has 32 rows and columns: the product's own, borrowed mutably, or the scratch's. `a` has
                    // 32 rows of `whole` steps: the left operand's, whose last number `check` has found within its slice, or
                    // the scratch's. `b` has `whole` steps of 32 columns, since panels are filled up.
                    unsafe {
                        if whole > 0 {
                            multiply_block(block);
                        }
                        if rest > 0 {
                            scratch.right[rest * BLOCK..].fill(0);
                            copy_rows((&b[whole * width..], width), (&mut scratch.right, BLOCK), rest, BLOCK);
                            block.a = a.add(whole);
                            (block.b, block.b_row, block.tiles) = (scratch.right.as_ptr(), BLOCK, 1);
                            block.add = add || whole > 0;
                            multiply_block(block);
                        }
                    }
                    if !is_whole {
                        copy_rows((&scratch.sums, BLOCK), (sums, out.row_stride), rows, columns);
                    }
                }
            }
        }
        // SAFETY: no tile is read any more.
        unsafe { release() };
    });
}

/// Writes the rows of a block to rows of `DEPTH` pairs, the steps side by side, and zeros up to whole tiles.
fn copy_left(source: &[u32], left: Left<'_, u32>, (rows, steps): (usize, usize), to: &mut [u32]) {
    let filled = steps.next_multiple_of(TILE);
    if left.step == 1 {
        copy_rows((source, left.row), (to, DEPTH), rows, steps);
    } else {
        assert_eq!(left.row, 1, "rows or steps lie side by side");
        turn_pairs(source, left.step, (steps, rows), to, DEPTH);
    }
    for (row, to) in to.chunks_exact_mut(DEPTH).enumerate() {
        to[if row < rows { steps } else { 0 }..filled].fill(0);
    }
}

/// Copies rows of `columns` numbers between rows that lie so many numbers apart.
fn copy_rows<T: Copy>(from: (&[T], usize), to: (&mut [T], usize), rows: usize, columns: usize) {
    for (from, to) in from.0.chunks(from.1).zip(to.0.chunks_mut(to.1)).take(rows) {
        to[..columns].copy_from_slice(&from[..columns]);
    }
}

/// `out = a * b`, or `out += a * b`, for 32 rows, 32 columns and `tiles` times 16 steps, at least once; rows lie `*_row`
/// numbers apart.
#[derive(Clone, Copy)]
struct Block {
    out: *mut f32,
    out_row: usize,
    a: *const u32,
    a_row: usize,
    b: *const u32,
    b_row: usize,
    tiles: usize,
    add: bool,
}

/// # Safety
/// The tiles are configured, and the pointers of `block` may be read and written at every number that its sizes name.
#[expect(unsafe_code, reason = "instructions of one processor family, on raw pointers")]
unsafe fn multiply_block(block: Block) {
    let (out_row, a_row, b_row) = (4 * block.out_row, 4 * block.a_row, 4 * block.b_row);
    // SAFETY: as the caller promised: the rows of every tile are 64 bytes, and the lower tiles begin 16 rows below the upper.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jz 2f",
            "tileloadd tmm0, [{out} + {out_row}]",
            "tileloadd tmm1, [{out} + {out_row} + 64]",
            "tileloadd tmm2, [{lower_out} + {out_row}]",
            "tileloadd tmm3, [{lower_out} + {out_row} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {a_row}]",
            "tileloadd tmm6, [{b} + {b_row}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {b_row} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower_a} + {a_row}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {lower_a}, 64",
            "add {b}, {b_tile}",
            "dec {tiles}",
            "jnz 3b",
            "tilestored [{out} + {out_row}], tmm0",
            "tilestored [{out} + {out_row} + 64], tmm1",
            "tilestored [{lower_out} + {out_row}], tmm2",
            "tilestored [{lower_out} + {out_row} + 64], tmm3",
            add = in(reg) usize::from(block.add),
            out = in(reg) block.out,
            lower_out = in(reg) block.out.add(TILE * block.out_row),
            out_row = in(reg) out_row,
            a = inout(reg) block.a => _,
            lower_a = inout(reg) block.a.add(TILE * block.a_row) => _,
            a_row = in(reg) a_row,
            b = inout(reg) block.b => _,
            b_row = in(reg) b_row,
            b_tile = in(reg) TILE * b_row,
            tiles = inout(reg) block.tiles => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// # Safety
/// The processor has AMX, and the process may use it.
#[expect(unsafe_code, reason = "an instruction of one processor family, on a raw pointer")]
unsafe fn load_configuration(configuration: &Configuration) {
    // SAFETY: it reads 64 bytes, which the structure has.
    unsafe { asm!("ldtilecfg [{}]", in(reg) std::ptr::from_ref(configuration), options(nostack, readonly, preserves_flags)) }
}

/// Frees the tiles, so that a change of threads does not save them.
///
/// # Safety
/// As [`load_configuration`].
#[expect(unsafe_code, reason = "an instruction of one processor family")]
unsafe fn release() {
    // SAFETY: it touches nothing but tiles.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
}
