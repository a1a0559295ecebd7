//! Executes the instructions of AMX that this crate uses where the processor has none, so that every machine tests them: an
//! instruction that the processor does not know raises a signal, whose handler decodes it and does its work. What is tested
//! is the machine code, its addresses and configuration, against the manual and not against a processor.
//! [Intel SDM, volume 2, LDTILECFG, TILELOADD, TDPBF16PS, TILESTORED, TILERELEASE]
#![expect(unsafe_code, reason = "a handler of signals, which reads and writes where instructions say")]

use std::cell::UnsafeCell;
use std::sync::Once;

use crate::isa::Isa;

/// Bytes in a row of a tile, and rows.
const ROW: usize = 64;
const ROWS: usize = 16;

struct Tile {
    rows: usize,
    row_bytes: usize,
    content: [[u8; ROW]; ROWS],
}

const NONE: Tile = Tile { rows: 0, row_bytes: 0, content: [[0; ROW]; ROWS] };

thread_local! {
    static TILES: UnsafeCell<[Tile; 8]> = const { UnsafeCell::new([NONE; 8]) };
}

/// From now on the process executes AMX, unless its processor does.
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if Isa::current() < Isa::Amx {
            // SAFETY: the structure is filled before it is used, and the handler is one that takes three arguments.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handle as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO;
                assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
            }
        }
    });
}

/// The general registers in the order of their encoding.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handle(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes the context of the thread, whose instruction pointer is at an instruction of our own code;
    // none of AMX is shorter than five bytes. The tiles are this thread's, and the code that the signal interrupted does
    // not touch them.
    let executed = unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        TILES
            .with(|tiles| execute(at, &mut *tiles.get(), |register| registers[REGISTERS[register] as usize] as usize))
            .map(|length| registers[libc::REG_RIP as usize] += length)
    };
    if executed.is_none() {
        // SAFETY: this gives the signal its meaning back; the instruction raises it again when the handler returns.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
    }
}

/// Executes the instruction; returns its length, or nothing where the processor would refuse it.
unsafe fn execute(at: *const u8, tiles: &mut [Tile; 8], register: impl Fn(usize) -> usize) -> Option<i64> {
    // SAFETY: the caller points at an instruction, of which no more is read than it has.
    let byte = |i: usize| usize::from(unsafe { at.add(i).read() });
    // Three bytes of VEX, of the map 0F38, without W and L; the registers' upper bits are stored inverted.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let (prefix, opcode, mode, first, second) = (byte(2) & 3, byte(3), byte(4) >> 6, byte(4) >> 3 & 7, byte(4) & 7);
    let [upper_index, upper_base] = [0x40, 0x20].map(|bit| if byte(1) & bit == 0 { 8 } else { 0 });
    let third = !(byte(2) >> 3) & 15;
    if mode == 3 {
        match (prefix, opcode) {
            (0, 0x49) if byte(4) == 0xc0 => *tiles = [NONE; 8],
            (3, 0x49) => tiles[first].content = NONE.content,
            (2, 0x5c) => multiply_add(tiles, first, second, third)?,
            _ => return None,
        }
        return Some(5);
    }
    let (base, index, scale, mut length) = match second {
        4 => (byte(5) & 7, Some((byte(5) >> 3 & 7) + upper_index), 1 << (byte(5) >> 6), 6),
        _ => (second, None, 0, 5),
    };
    if mode == 0 && base == 5 {
        return None;
    }
    let mut address = register(base + upper_base);
    if mode == 1 {
        address = address.wrapping_add_signed(byte(5 + usize::from(second == 4)) as u8 as i8 as isize);
        length += 1;
    }
    if mode == 2 {
        let from = 5 + usize::from(second == 4);
        let bytes = [0, 1, 2, 3].map(|i| byte(from + i) as u8);
        address = address.wrapping_add_signed(i32::from_le_bytes(bytes) as isize);
        length += 4;
    }
    let stride = match index {
        Some(4) | None => 0,
        Some(index) => scale * register(index),
    };
    // SAFETY: our own code gave the instruction this address and this distance of rows.
    unsafe {
        match (prefix, opcode, index) {
            (0, 0x49, _) => configure(tiles, address as *const u8)?,
            (3, 0x4b, Some(_)) => {
                let tile = configured(&mut tiles[first])?;
                tile.content = NONE.content;
                for (row, content) in tile.content.iter_mut().take(tile.rows).enumerate() {
                    let from = (address as *const u8).wrapping_add(row * stride);
                    std::ptr::copy_nonoverlapping(from, content.as_mut_ptr(), tile.row_bytes);
                }
            }
            (2, 0x4b, Some(_)) => {
                let tile = configured(&mut tiles[first])?;
                for (row, content) in tile.content.iter().take(tile.rows).enumerate() {
                    let to = (address as *mut u8).wrapping_add(row * stride);
                    std::ptr::copy_nonoverlapping(content.as_ptr(), to, tile.row_bytes);
                }
            }
            _ => return None,
        }
    }
    Some(length)
}

fn configured(tile: &mut Tile) -> Option<&mut Tile> {
    (tile.rows > 0 && tile.row_bytes > 0).then_some(tile)
}

unsafe fn configure(tiles: &mut [Tile; 8], from: *const u8) -> Option<()> {
    // SAFETY: the instruction reads 64 bytes.
    let bytes = unsafe { from.cast::<[u8; 64]>().read_unaligned() };
    let valid = bytes[0] == 1 && bytes[1..16].iter().all(|byte| *byte == 0);
    let unused = bytes[32..48].iter().chain(&bytes[56..]).all(|byte| *byte == 0);
    if !(valid && unused) {
        return None;
    }
    for (i, tile) in tiles.iter_mut().enumerate() {
        let row_bytes = usize::from(u16::from_le_bytes([bytes[16 + 2 * i], bytes[17 + 2 * i]]));
        let rows = usize::from(bytes[48 + i]);
        if row_bytes > ROW || rows > ROWS || (rows == 0) != (row_bytes == 0) {
            return None;
        }
        *tile = Tile { rows, row_bytes, ..NONE };
    }
    Some(())
}

/// `sums += a * b`. Numbers below the smallest normal one count as zero, and so does a result of that size.
fn multiply_add(tiles: &mut [Tile; 8], sums: usize, a: usize, b: usize) -> Option<()> {
    let distinct = sums != a && a != b && b != sums;
    let fits = tiles[sums].rows == tiles[a].rows
        && tiles[sums].row_bytes == tiles[b].row_bytes
        && tiles[a].row_bytes == 4 * tiles[b].rows
        && tiles[sums].rows > 0
        && tiles[b].rows > 0;
    if !(distinct && fits) {
        return None;
    }
    let flushed = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let half = |tile: &Tile, row: usize, i: usize| {
        let bits = u16::from_le_bytes([tile.content[row][2 * i], tile.content[row][2 * i + 1]]);
        flushed(f32::from_bits(u32::from(bits) << 16))
    };
    for row in 0..tiles[sums].rows {
        for column in 0..tiles[sums].row_bytes / 4 {
            let mut both = [0f32; 2];
            for step in 0..tiles[b].rows {
                for (i, sum) in both.iter_mut().enumerate() {
                    let (left, right) = (half(&tiles[a], row, 2 * step + i), half(&tiles[b], step, 2 * column + i));
                    *sum = flushed(left.mul_add(right, *sum));
                }
            }
            let bytes = &mut tiles[sums].content[row][4 * column..4 * column + 4];
            let sum = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let sum = flushed(flushed(sum) + flushed(both[0] + both[1]));
            bytes.copy_from_slice(&sum.to_le_bytes());
        }
    }
    Some(())
}
