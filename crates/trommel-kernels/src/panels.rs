//! Products with a right operand that was rearranged once: most of the time of training goes into these.
//!
//! The gemm crate rearranges its operands anew for each product, which for a weight and the few hundred rows of a sequence
//! is a sixth of the time. Here the right operand becomes panels of 64, 32 or 16 columns, once for many products, which go tile
//! by tile; see `tiles`.
//!
//! In `Precision::F32` a step of a product is one number of depth. In `Precision::Bf16` it is a pair of `bf16` in 32 bits, so
//! that one instruction multiplies and adds twice as many numbers; the left operand is rounded and paired too, once per
//! product or, as `Rows`, once for several. Sums are `f32` in both.
//!
//! Below AVX2 the gemm crate, which chooses its own instructions, multiplies with each panel. Where no instruction multiplies
//! pairs, the numbers are `f32` that were rounded to `bf16`.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

#[cfg(target_arch = "x86_64")]
use crate::amx;
use crate::bf16::{self, interleave, interleave_pairs, pair_up_columns, round_all, turn_pairs};
use crate::isa::Isa;
use crate::matmul::{Matrix, MatrixMut, Target, multiply};
use crate::rows::{Numbers, Operand, Rows};
use crate::tiles::{self, Left, Right, Width};

/// The numbers that are multiplied; sums are `f32` always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As they are.
    F32,
    /// Rounded to 8 bits of mantissa, to the nearest, ties to even.
    Bf16,
}

/// A right operand, as panels of 64, 32 or 16 columns, each (rows, columns of the panel) or, in pairs, half as many rows; the last
/// one is filled up with zeros.
#[derive(Debug)]
pub struct Panels {
    rows: usize,
    columns: usize,
    isa: Isa,
    width: Width,
    numbers: Numbers,
}

thread_local! {
    /// The left operand of one product.
    static LEFT: RefCell<Rows> = RefCell::new(Rows::new(Precision::Bf16));
}

impl Panels {
    /// Without content, for numbers of this precision.
    pub fn new(precision: Precision) -> Panels {
        Self::for_level(Isa::current(), precision, Width::Wide.at(Isa::current()))
    }

    /// [`Panels::new`] with panels of 64 columns at every level, for [`Panels::turned`].
    pub(crate) fn wide(precision: Precision) -> Panels {
        Self::for_level(Isa::current(), precision, Width::Wide)
    }

    /// [`Panels::new`] for products with few columns.
    pub(crate) fn narrow(precision: Precision) -> Panels {
        Self::for_level(Isa::current(), precision, Width::Narrow.at(Isa::current()))
    }

    fn for_level(isa: Isa, precision: Precision, width: Width) -> Panels {
        Panels { rows: 0, columns: 0, isa, width, numbers: Numbers::new(isa, precision) }
    }

    /// Replaces the content by that of `right`, on all threads.
    pub fn pack(&mut self, right: Matrix<'_>) {
        self.replace(right, true);
    }

    /// [`Panels::pack`] on the calling thread.
    pub fn pack_here(&mut self, right: Matrix<'_>) {
        self.replace(right, false);
    }

    fn replace(&mut self, right: Matrix<'_>, all_threads: bool) {
        self.reserve(right.rows, right.columns);
        let steps = self.steps();
        self.cut(all_threads).write(&mut self.numbers, 0..steps, right);
    }

    /// Replaces the content by `columns` of `rows` of `of`, which are of the same kind, on this thread. Both ends of `columns`
    /// are even.
    pub fn pack_columns(&mut self, of: &Rows, rows: Range<usize>, columns: &Range<usize>) {
        assert!(self.numbers.is_like(&of.numbers), "both operands of a product are of one kind");
        match of.operand_of(&rows, columns) {
            Operand::Whole(part) => self.pack_here(Matrix::strided(part.data, rows.len(), columns.len(), part.row)),
            Operand::Paired(part) => self.fill_from_pairs((rows.len(), columns.len()), |first, here, panel, width| {
                interleave_pairs(part.data, part.row, rows.len(), first..first + here, panel, width);
            }),
        }
    }

    /// [`Panels::pack_columns`], transposed.
    pub(crate) fn pack_columns_turned(&mut self, of: &Rows, rows: Range<usize>, columns: &Range<usize>) {
        assert!(self.numbers.is_like(&of.numbers), "both operands of a product are of one kind");
        match of.operand_of(&rows, columns) {
            Operand::Whole(part) => {
                self.pack_here(Matrix::strided(part.data, rows.len(), columns.len(), part.row).transposed());
            }
            Operand::Paired(part) => self.fill_from_pairs((columns.len(), rows.len()), |first, here, panel, width| {
                turn_pairs(&part.data[first * part.row..], part.row, (here, part.steps), panel, width);
            }),
        }
    }

    /// Replaces the content by (rows, columns) numbers in pairs, which `fill(first column, columns, panel, width)` writes to each
    /// panel.
    fn fill_from_pairs(&mut self, (rows, columns): (usize, usize), fill: impl Fn(usize, usize, &mut [u32], usize)) {
        self.reserve(rows, columns);
        let (len, steps, width) = (self.len(), self.steps(), self.width.columns());
        let Numbers::Paired(pairs) = &mut self.numbers else { unreachable!("both operands of a product are of one kind") };
        for (panel, first) in pairs[..len].chunks_exact_mut((width * steps).max(1)).zip((0..columns).step_by(width)) {
            let here = width.min(columns - first);
            if here < width {
                panel.fill(0);
            }
            fill(first, here, panel, width);
        }
    }

    /// Makes room for `rows` rows of `columns` columns, which [`Panels::store`] is to write.
    pub fn reserve(&mut self, rows: usize, columns: usize) {
        (self.rows, self.columns) = (rows, columns);
        self.numbers.grow(self.len());
    }

    /// Replaces the rows from `first` on, an even number, by those of `right`: an even number of them, or the last ones.
    pub fn store(&mut self, first: usize, right: Matrix<'_>) {
        let end = first + right.rows;
        assert!(right.columns == self.columns && end <= self.rows, "rows of another shape");
        assert!(first.is_multiple_of(2) && (end == self.rows || end.is_multiple_of(2)), "rows that cut a pair");
        let unit = self.numbers.per_step();
        self.cut(false).write(&mut self.numbers, first / unit..end.div_ceil(unit), right);
    }

    fn cut(&self, all_threads: bool) -> Cut {
        Cut { steps: self.steps(), len: self.len(), width: self.width.columns(), all_threads }
    }

    /// Numbers or pairs in all panels.
    fn len(&self) -> usize {
        self.steps() * self.columns.next_multiple_of(self.width.columns())
    }

    /// Rows of the right operand.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Steps of a panel.
    fn steps(&self) -> usize {
        self.rows.div_ceil(self.numbers.per_step())
    }

    /// `out = left * panels`, or `out += left * panels`, on the calling thread.
    pub fn multiply(&self, out: MatrixMut<'_>, target: Target, left: Matrix<'_>) {
        assert_eq!((left.rows, left.columns), (out.rows, self.rows), "sizes of a product differ");
        if let Numbers::Whole(_) = self.numbers {
            let (data, row, step, steps) = (left.data, left.row_stride, left.column_stride, left.columns);
            return self.multiply_from(0, out, target, Operand::Whole(Left { data, row, step, steps }));
        }
        self.with_left(|rows| {
            rows.pack(left);
            self.multiply_from(0, out, target, rows.operand(0));
        });
    }

    /// [`Panels::multiply`] with a left operand whose rows `make` writes to `row` one after the other, so that each is rounded
    /// while it lies in the first cache. `make` multiplies nothing itself.
    pub fn multiply_made(&self, out: MatrixMut<'_>, target: Target, row: &mut [f32], mut make: impl FnMut(usize, &mut [f32])) {
        assert_eq!(row.len(), self.rows, "inner sizes of a product differ");
        self.with_left(|left| {
            left.reserve(out.rows, self.rows);
            for i in 0..out.rows {
                make(i, row);
                left.store(i, Matrix::new(row, 1, self.rows));
            }
            self.multiply_from(0, out, target, left.operand(0));
        });
    }

    /// Lends the memory for a left operand.
    fn with_left(&self, work: impl FnOnce(&mut Rows)) {
        LEFT.with_borrow_mut(|rows| {
            // The numbers of a thread's products change between models, not between products.
            if !rows.numbers.is_like(&self.numbers) {
                *rows = Rows::of(self.numbers.like());
            }
            work(rows);
        });
    }

    /// [`Panels::multiply`] with the rows from `first` on of a left operand that was packed before, in the same precision.
    pub fn multiply_rows(&self, out: MatrixMut<'_>, target: Target, left: &Rows, first: usize) {
        assert_eq!(left.steps, self.steps(), "inner sizes of a product differ");
        assert!(first + out.rows <= left.rows, "rows of another shape");
        self.multiply_from(0, out, target, left.operand(first));
    }

    /// [`Panels::multiply`] with the columns from `first` on of rows that were packed before, transposed: a product whose
    /// depth are the rows. `first` is even.
    pub fn multiply_turned(&self, out: MatrixMut<'_>, target: Target, left: &Rows, first: usize) {
        // The columns side by side: a tile reads a few numbers of each row, which lie far apart.
        self.with_left(|turned| {
            turned.pack_turned(left, self.rows, first, out.rows);
            self.multiply_from(0, out, target, turned.operand(0));
        });
    }

    /// [`Panels::multiply`] with the rows of the panels from `first` on, as many as `left` has columns. `first` is even.
    pub(crate) fn multiply_from(&self, first: usize, out: MatrixMut<'_>, target: Target, left: Operand<'_>) {
        assert_eq!(out.columns, self.columns, "outer sizes of a product differ");
        if out.rows == 0 || out.columns == 0 {
            return;
        }
        if self.rows == 0 {
            let rows = out.rows;
            return multiply(out, target, 1.0, Matrix::new(&[], rows, 0), Matrix::new(&[], 0, self.columns));
        }
        let len = self.len();
        match (&self.numbers, left) {
            (Numbers::Whole(numbers) | Numbers::Rounded(numbers), Operand::Whole(left)) => {
                self.multiply_whole(&numbers[..len], first, out, target, left);
            }
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calls a variant after checking for its instructions")]
            (Numbers::Paired(panels), Operand::Paired(left)) => {
                assert!(first.is_multiple_of(2), "a product begins within a pair");
                let right = Right { panels: &panels[..len], width: self.width, steps: self.steps(), first: first / 2 };
                // SAFETY: pairs are made only for levels that multiply them, and this is the panels'.
                unsafe {
                    match self.isa {
                        Isa::Amx => amx::multiply(out, target, left, right),
                        _ => tiles::multiply::<tiles::Avx512Bf16>(out, target, left, right),
                    }
                }
            }
            _ => unreachable!("both operands are of one precision, and pairs exist where they are multiplied"),
        }
    }

    fn multiply_whole(&self, panels: &[f32], first: usize, out: MatrixMut<'_>, target: Target, left: Left<'_, f32>) {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "calls a variant after checking for its instructions")]
        {
            let right = Right { panels, width: self.width, steps: self.rows, first };
            // SAFETY: the level has the instructions.
            match (self.isa, self.width) {
                (Isa::Avx2, Width::Slim) => return unsafe { tiles::multiply::<tiles::Avx2>(out, target, left, right) },
                (isa, _) if isa >= Isa::Avx512 => return unsafe { tiles::multiply::<tiles::Avx512>(out, target, left, right) },
                _ => {}
            }
        }
        let (width, steps) = (self.width.columns(), left.steps);
        let (row_stride, column_stride) = (left.row, left.step);
        assert!((out.rows - 1) * row_stride + steps.saturating_sub(1) * column_stride < left.data.len());
        let left = Matrix { data: left.data, rows: out.rows, columns: steps, row_stride, column_stride };
        for (panel, numbers) in panels.chunks_exact(width * self.rows).enumerate() {
            let columns = width.min(self.columns - panel * width);
            let out = MatrixMut::strided(&mut out.data[panel * width..], out.rows, columns, out.row_stride);
            multiply(out, target, 1.0, left, Matrix::strided(&numbers[first * width..], steps, columns, width));
        }
    }

    /// The transposed content as a left operand: row r is column r, of the first panel.
    pub(crate) fn turned(&self) -> Operand<'_> {
        self.numbers.operand(0, 1, self.width.columns(), self.steps())
    }
}

/// How a right operand is cut into panels.
struct Cut {
    steps: usize,
    len: usize,
    width: usize,
    all_threads: bool,
}

impl Cut {
    /// Writes the numbers of `right` to some steps of each panel.
    fn write(&self, numbers: &mut Numbers, steps: Range<usize>, right: Matrix<'_>) {
        let width = self.width;
        let part = steps.start * width..steps.end * width;
        match numbers {
            Numbers::Whole(numbers) => self.for_each(numbers, |i, panel| fill(i, width, &mut panel[part.clone()], right)),
            Numbers::Rounded(numbers) => self.for_each(numbers, |i, panel| {
                fill(i, width, &mut panel[part.clone()], right);
                round_all(&mut panel[part.clone()]);
            }),
            Numbers::Paired(pairs) => self.for_each(pairs, |i, panel| fill_pairs(i, width, &mut panel[part.clone()], right)),
        }
    }

    /// Calls `work` with the number of each panel and its content.
    fn for_each<T: Send>(&self, panels: &mut [T], work: impl Fn(usize, &mut [T]) + Sync) {
        let (panels, panel) = (&mut panels[..self.len], (self.width * self.steps).max(1));
        if self.all_threads {
            panels.par_chunks_mut(panel).enumerate().for_each(|(i, panel)| work(i, panel));
        } else {
            panels.chunks_mut(panel).enumerate().for_each(|(i, panel)| work(i, panel));
        }
    }
}

/// Writes one panel of `right`.
fn fill(panel: usize, width: usize, numbers: &mut [f32], right: Matrix<'_>) {
    let first = panel * width;
    let columns = width.min(right.columns - first);
    let source = &right.data[first * right.column_stride..];
    for (row, numbers) in numbers.chunks_exact_mut(width).enumerate() {
        let (numbers, rest) = numbers.split_at_mut(columns);
        let source = &source[row * right.row_stride..];
        if right.column_stride == 1 {
            let source = &source[..columns];
            // Of so few numbers as a slim panel has, the call of a function that copies any number costs more than the copy.
            match (<&mut [f32; 16]>::try_from(&mut *numbers), source.try_into()) {
                (Ok(numbers), Ok(source)) => *numbers = source,
                _ => numbers.copy_from_slice(source),
            }
        } else {
            for (column, number) in numbers.iter_mut().enumerate() {
                *number = source[column * right.column_stride];
            }
        }
        rest.fill(0.0);
    }
}

/// Writes one panel of `right`, in pairs.
fn fill_pairs(panel: usize, width: usize, pairs: &mut [u32], right: Matrix<'_>) {
    let first = panel * width;
    let columns = width.min(right.columns - first);
    let source = &right.data[first * right.column_stride..];
    if columns < width {
        pairs.fill(0);
    }
    if right.column_stride == 1 {
        return interleave(source, right.row_stride, (right.rows, columns), pairs, width);
    }
    assert!(right.row_stride == 1 || right.rows == 1, "one of a matrix's strides is 1");
    for column in (0..columns).step_by(bf16::COLUMNS) {
        let here = bf16::COLUMNS.min(columns - column);
        let stride = right.column_stride;
        pair_up_columns(&source[column * stride..], stride, (right.rows, here), &mut pairs[column..], width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::round_to_bf16;
    use crate::probe::{close, levels, numbers};
    use crate::tiles::DEPTH;

    #[test]
    fn products_equal_the_naive_loop_at_odd_sizes() {
        let sizes = [
            (1, 1, 1),
            (6, 3, 64),
            (7, 33, 65),
            (20, DEPTH + 5, 150),
            (5, 2 * DEPTH, 16),
            (3, 0, 4),
            (0, 3, 4),
            (4, 7, 128),
            (3, 2 * DEPTH + 3, 5),
            (66, 2 * DEPTH + 64, 96),
        ];
        for (m, k, n) in sizes {
            let (a, b, start) = (numbers(m * k, 1), numbers(k * n, 2), numbers(m * (n + 3), 3));
            let at: Vec<f32> = (0..k * m).map(|i| a[(i % m) * k + i / m]).collect();
            let bt: Vec<f32> = (0..n * k).map(|i| b[(i % k.max(1)) * n + i / k.max(1)]).collect();
            for precision in [Precision::F32, Precision::Bf16] {
                let value = |x: f32| if precision == Precision::F32 { x } else { round_to_bf16(x) };
                let expected = |target: Target, i: usize| {
                    let (row, column) = (i / (n + 3), i % (n + 3));
                    let product = |l: usize| f64::from(value(a[row * k + l])) * f64::from(value(b[l * n + column]));
                    let kept = if target == Target::Add || column >= n { f64::from(start[i]) } else { 0.0 };
                    kept + if column < n { (0..k).map(product).sum() } else { 0.0 }
                };
                let widths = |isa| {
                    [Width::Slim, Width::Narrow, Width::Wide]
                        .into_iter()
                        .skip(usize::from(isa > Isa::Avx2))
                        .map(move |width| (isa, width))
                };
                for (isa, width) in levels(precision).into_iter().flat_map(widths) {
                    let mut panels = Panels::for_level(isa, precision, width);
                    panels.pack(Matrix::new(&[1.0; 300], 2, 150));
                    for (left, right) in [
                        (Matrix::new(&a, m, k), Matrix::new(&b, k, n)),
                        (Matrix::new(&at, k, m).transposed(), Matrix::new(&bt, n, k).transposed()),
                    ] {
                        panels.pack(right);
                        for target in [Target::Overwrite, Target::Add] {
                            let mut out = start.clone();
                            panels.multiply(MatrixMut::strided(&mut out, m, n, n + 3), target, left);
                            for (i, out) in out.iter().enumerate() {
                                close(f64::from(*out), expected(target, i), 1e-5);
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn some_rows_of_the_panels_and_their_turned_columns_multiply() {
        let (rows, columns, first) = (37, 41, 10);
        let (a, b) = (numbers(5 * (rows - first), 1), numbers(rows * columns, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            let value = |x: f32| if precision == Precision::F32 { x } else { round_to_bf16(x) };
            for isa in levels(precision) {
                let [mut narrow, mut wide] = [Width::Narrow, Width::Wide].map(|width| Panels::for_level(isa, precision, width));
                narrow.pack(Matrix::new(&b, rows, columns));
                let mut left = Rows::of(Numbers::new(isa, precision));
                left.pack(Matrix::new(&a, 5, rows - first));
                let mut out = vec![0.0; 5 * columns];
                narrow.multiply_from(first, MatrixMut::new(&mut out, 5, columns), Target::Overwrite, left.operand(0));
                for (i, out) in out.iter().enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let product = |l: usize| {
                        f64::from(value(a[row * (rows - first) + l])) * f64::from(value(b[(first + l) * columns + column]))
                    };
                    close(f64::from(*out), (0..rows - first).map(product).sum(), 1e-5);
                }
                // The square of a matrix with its transposed self.
                wide.pack(Matrix::new(&b, rows, columns));
                let mut square = vec![0.0; columns * columns];
                wide.multiply_from(0, MatrixMut::new(&mut square, columns, columns), Target::Overwrite, wide.turned());
                for (i, out) in square.iter().enumerate() {
                    let product = |l: usize| {
                        f64::from(value(b[l * columns + i / columns])) * f64::from(value(b[l * columns + i % columns]))
                    };
                    close(f64::from(*out), (0..rows).map(product).sum(), 1e-5);
                }
            }
        }
    }

    #[test]
    fn rows_in_parts_come_back_and_multiply_both_ways() {
        for (rows, columns) in [(1, 1), (5, 7), (50, 34), (67, 130)] {
            let (x, other) = (numbers(rows * columns, 1), numbers(rows * 9, 2));
            for precision in [Precision::F32, Precision::Bf16] {
                let value = |x: f32| if precision == Precision::F32 { x } else { round_to_bf16(x) };
                for isa in levels(precision) {
                    let mut packed = Rows::of(Numbers::new(isa, precision));
                    packed.pack(Matrix::new(&[1.0; 999], 3, 333));
                    packed.reserve(rows, columns);
                    for (i, mut part) in packed.parts(4).into_iter().enumerate() {
                        let here = &x[4 * i * columns..(4 * (i + 1) * columns).min(x.len())];
                        part.store(0, Matrix::new(here, here.len() / columns, columns));
                    }
                    let mut back = vec![0.0; rows * columns];
                    packed.load(0, &mut back);
                    assert!(back.iter().zip(&x).all(|(back, x)| *back == value(*x)));

                    let mut right = Panels::for_level(isa, precision, Width::Wide);
                    right.reserve(rows, 9);
                    for first in (0..rows).step_by(6) {
                        let here = 6.min(rows - first);
                        right.store(first, Matrix::new(&other[first * 9..(first + here) * 9], here, 9));
                    }
                    let first = (columns / 3) & !1;
                    let mut out = vec![0.0; (columns - first) * 9];
                    let product = MatrixMut::new(&mut out, columns - first, 9);
                    right.multiply_turned(product, Target::Overwrite, &packed, first);
                    for (i, out) in out.iter().enumerate() {
                        let product = |row: usize| {
                            let (a, b) = (x[row * columns + first + i / 9], other[row * 9 + i % 9]);
                            f64::from(value(a)) * f64::from(value(b))
                        };
                        close(f64::from(*out), (0..rows).map(product).sum(), 1e-5);
                    }

                    right.pack(Matrix::new(&x, rows, columns).transposed());
                    let mut out = vec![0.0; rows.min(2) * rows];
                    let first = rows - rows.min(2);
                    right.multiply_rows(MatrixMut::new(&mut out, rows.min(2), rows), Target::Overwrite, &packed, first);
                    for (i, out) in out.iter().enumerate() {
                        let product = |column: usize| {
                            let (a, b) = (x[(first + i / rows) * columns + column], x[i % rows * columns + column]);
                            f64::from(value(a)) * f64::from(value(b))
                        };
                        close(f64::from(*out), (0..columns).map(product).sum(), 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn columns_of_rows_multiply_and_become_panels_in_both_directions() {
        let (x, a, row) = (numbers(80 * 150, 1), numbers(3 * 102, 2), 150);
        for (rows, columns) in [(0..1, 0..2), (3..80, 4..40), (5..73, 6..70), (10..75, 30..132)] {
            for precision in [Precision::F32, Precision::Bf16] {
                for (isa, width) in levels(precision).into_iter().flat_map(|isa| [(isa, Width::Narrow), (isa, Width::Wide)]) {
                    let mut of = Rows::of(Numbers::new(isa, precision));
                    of.pack(Matrix::new(&x, 80, row));
                    let part = Matrix::strided(&x[rows.start * row + columns.start..], rows.len(), columns.len(), row);
                    let mut right = Panels::for_level(isa, precision, width);
                    right.pack_here(Matrix::new(&a[..3 * columns.len()], 3, columns.len()).transposed());
                    let mut expected = vec![0.0; 3 * rows.len()];
                    right.multiply(MatrixMut::new(&mut expected, rows.len(), 3), Target::Overwrite, part);
                    let mut out = vec![0.0; expected.len()];
                    let product = MatrixMut::new(&mut out, rows.len(), 3);
                    right.multiply_from(0, product, Target::Overwrite, of.operand_of(&rows, &columns));
                    assert_eq!(out, expected);
                    for turned in [false, true] {
                        let part = if turned { part.transposed() } else { part };
                        let product = |pack: &dyn Fn(&mut Panels)| {
                            let mut panels = Panels::for_level(isa, precision, width);
                            panels.pack_here(Matrix::new(&[f32::NAN; 160 * 160], 160, 160));
                            pack(&mut panels);
                            let mut out = vec![0.0; 3 * part.columns];
                            let left = Matrix::new(&a[..3 * part.rows], 3, part.rows);
                            panels.multiply(MatrixMut::new(&mut out, 3, part.columns), Target::Overwrite, left);
                            out
                        };
                        let got = product(&|panels| match turned {
                            false => panels.pack_columns(&of, rows.clone(), &columns),
                            true => panels.pack_columns_turned(&of, rows.clone(), &columns),
                        });
                        assert_eq!(got, product(&|panels| panels.pack_here(part)));
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_made_multiply_as_if_they_lay_there() {
        let (rows, depth, columns) = (23, 37, 70);
        let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            for isa in levels(precision) {
                let mut panels = Panels::for_level(isa, precision, Width::Wide);
                panels.pack(Matrix::new(&b, depth, columns));
                let [mut expected, mut out] = [1.0, 1.0].map(|start| vec![start; rows * columns]);
                panels.multiply(MatrixMut::new(&mut expected, rows, columns), Target::Add, Matrix::new(&a, rows, depth));
                let product = MatrixMut::new(&mut out, rows, columns);
                panels.multiply_made(product, Target::Add, &mut vec![0.0; depth], |i, row| {
                    row.copy_from_slice(&a[i * depth..(i + 1) * depth]);
                });
                assert_eq!(out, expected);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (rows, depth, columns) = (70, 300, 70);
        let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
        for precision in [Precision::F32, Precision::Bf16] {
            for isa in levels(precision) {
                let mut panels = Panels::for_level(isa, precision, Width::Wide);
                panels.pack_here(Matrix::new(&b, depth, columns));
                let product = |rows: Range<usize>| {
                    let mut out = vec![0.0; rows.len() * columns];
                    let left = Matrix::new(&a[rows.start * depth..rows.end * depth], rows.len(), depth);
                    panels.multiply(MatrixMut::new(&mut out, rows.len(), columns), Target::Overwrite, left);
                    out
                };
                assert_eq!(product(0..rows)[5 * columns..6 * columns], product(5..6));
            }
        }
    }

    #[test]
    fn nan_and_infinity_pass_through() {
        for precision in [Precision::F32, Precision::Bf16] {
            for isa in levels(precision) {
                let mut panels = Panels::for_level(isa, precision, Width::Wide);
                panels.pack(Matrix::new(&[1.0, 2.0, 3.0, 4.0], 2, 2));
                let product = |left: [f32; 2]| {
                    let mut out = [0.0; 2];
                    panels.multiply(MatrixMut::new(&mut out, 1, 2), Target::Overwrite, Matrix::new(&left, 1, 2));
                    out
                };
                assert!(product([f32::NAN, 0.0]).iter().all(|x| x.is_nan()));
                assert_eq!(product([f32::INFINITY, 1.0]), [f32::INFINITY; 2]);
            }
        }
    }
}
