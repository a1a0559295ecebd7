//! Rows in the numbers that products read: rounded and paired once for several products, and kept instead of `f32`. They are
//! left operands as they are, and right ones once they are cut into panels.

use std::ops::Range;

use crate::bf16::{interleave, interleave_pairs, pair_up, round_all, unpair};
use crate::isa::Isa;
use crate::lines::Lines;
use crate::matmul::Matrix;
use crate::panels::Precision;
use crate::tiles::Left;

/// The numbers of an operand, left or right.
#[derive(Debug)]
pub(crate) enum Numbers {
    /// As they are.
    Whole(Lines<f32>),
    /// Rounded to `bf16`: where no instruction multiplies pairs.
    Rounded(Lines<f32>),
    /// Pairs of `bf16` along the depth of the product, the first one in the low half.
    Paired(Lines<u32>),
}

impl Numbers {
    /// None yet.
    pub(crate) fn new(isa: Isa, precision: Precision) -> Numbers {
        match precision {
            Precision::F32 => Numbers::Whole(Lines::default()),
            Precision::Bf16 if isa >= Isa::Avx512Bf16 => Numbers::Paired(Lines::default()),
            Precision::Bf16 => Numbers::Rounded(Lines::default()),
        }
    }

    /// None, of the same kind.
    pub(crate) fn like(&self) -> Numbers {
        match self {
            Numbers::Whole(_) => Numbers::Whole(Lines::default()),
            Numbers::Rounded(_) => Numbers::Rounded(Lines::default()),
            Numbers::Paired(_) => Numbers::Paired(Lines::default()),
        }
    }

    /// Whether both hold the same kind.
    pub(crate) fn is_like(&self, other: &Numbers) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// How many numbers of the depth of a product a step takes.
    pub(crate) fn per_step(&self) -> usize {
        if matches!(self, Numbers::Paired(_)) { 2 } else { 1 }
    }

    /// Makes room for `len` numbers or pairs; what is there already stays, so that sizes that change cost nothing.
    pub(crate) fn grow(&mut self, len: usize) {
        match self {
            Numbers::Whole(numbers) | Numbers::Rounded(numbers) if numbers.len() < len => numbers.resize(len, 0.0),
            Numbers::Paired(pairs) if pairs.len() < len => pairs.resize(len, 0),
            _ => {}
        }
    }

    /// A left operand that begins at number `from`; `row` and `step` as in [`Left`].
    pub(crate) fn operand(&self, from: usize, row: usize, step: usize, steps: usize) -> Operand<'_> {
        match self {
            Numbers::Whole(data) | Numbers::Rounded(data) => Operand::Whole(Left { data: &data[from..], row, step, steps }),
            Numbers::Paired(data) => Operand::Paired(Left { data: &data[from..], row, step, steps }),
        }
    }
}

/// Rows in the numbers that products of their precision read.
#[derive(Debug)]
pub struct Rows {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row: usize,
    pub(crate) step: usize,
    pub(crate) steps: usize,
    pub(crate) numbers: Numbers,
}

/// A left operand as the products read it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// Numbers.
    Whole(Left<'a, f32>),
    /// Pairs of `bf16`.
    Paired(Left<'a, u32>),
}

impl Rows {
    /// Without content, for numbers of this precision.
    pub fn new(precision: Precision) -> Rows {
        Self::of(Numbers::new(Isa::current(), precision))
    }

    /// Without content, for these numbers.
    pub(crate) fn of(numbers: Numbers) -> Rows {
        Rows { rows: 0, columns: 0, row: 0, step: 0, steps: 0, numbers }
    }

    /// Makes room for `rows` rows of `columns` numbers, which [`Rows::store`] is to write.
    pub fn reserve(&mut self, rows: usize, columns: usize) {
        (self.rows, self.columns) = (rows, columns);
        self.steps = columns.div_ceil(self.numbers.per_step());
        (self.row, self.step) = (self.steps, 1);
        self.numbers.grow(rows * self.steps);
    }

    /// Replaces the rows from `first` on by those of `rows`, whose numbers lie side by side.
    pub fn store(&mut self, first: usize, rows: Matrix<'_>) {
        assert!(self.step == 1 && first + rows.rows <= self.rows, "rows of another shape");
        let (columns, steps) = (self.columns, self.steps);
        let numbers = match &mut self.numbers {
            Numbers::Whole(numbers) => NumbersMut::Whole(numbers),
            Numbers::Rounded(numbers) => NumbersMut::Rounded(numbers),
            Numbers::Paired(pairs) => NumbersMut::Paired(pairs),
        };
        RowsMut { columns, steps, numbers }.store(first, rows);
    }

    /// Parts of `rows` rows each, for as many tasks.
    pub(crate) fn parts(&mut self, rows: usize) -> Vec<RowsMut<'_>> {
        assert_eq!(self.step, 1, "rows of another shape");
        let (columns, steps) = (self.columns, self.steps);
        let (part, all) = (rows * steps.max(1), self.rows * steps);
        let rows = |numbers| RowsMut { columns, steps, numbers };
        match &mut self.numbers {
            Numbers::Whole(all_rows) => all_rows[..all].chunks_mut(part).map(|part| rows(NumbersMut::Whole(part))).collect(),
            Numbers::Rounded(all_rows) => {
                all_rows[..all].chunks_mut(part).map(|part| rows(NumbersMut::Rounded(part))).collect()
            }
            Numbers::Paired(pairs) => pairs[..all].chunks_mut(part).map(|part| rows(NumbersMut::Paired(part))).collect(),
        }
    }

    /// Writes the rows from `first` on to `out` (rows, columns).
    pub fn load(&self, first: usize, out: &mut [f32]) {
        assert!(self.step == 1 && first * self.columns + out.len() <= self.rows * self.columns, "rows of another shape");
        match &self.numbers {
            Numbers::Whole(numbers) | Numbers::Rounded(numbers) => {
                out.copy_from_slice(&numbers[first * self.row..][..out.len()]);
            }
            Numbers::Paired(pairs) => {
                let pairs = pairs[first * self.row..].chunks_exact(self.row.max(1));
                out.chunks_exact_mut(self.columns.max(1)).zip(pairs).for_each(|(out, pairs)| unpair(pairs, out));
            }
        }
    }

    /// Replaces the content by that of `left`, in the order in which it lies.
    pub fn pack(&mut self, left: Matrix<'_>) {
        if left.column_stride == 1 {
            self.reserve(left.rows, left.columns);
            return self.store(0, left);
        }
        assert_eq!(left.row_stride, 1, "one of a matrix's strides is 1");
        let (rows, columns) = (left.rows, left.columns);
        let line = |i: usize| &left.data[i * left.column_stride..][..rows];
        self.reserve(rows, columns);
        (self.row, self.step) = (1, rows);
        if rows == 0 {
            return;
        }
        match &mut self.numbers {
            Numbers::Whole(numbers) => copy(numbers, (0..columns).map(line)),
            Numbers::Rounded(numbers) => {
                copy(numbers, (0..columns).map(line));
                round_all(&mut numbers[..rows * columns]);
            }
            Numbers::Paired(pairs) => {
                interleave(left.data, left.column_stride, (columns, rows), pairs, rows);
            }
        }
    }

    /// Replaces the content by columns `first..first + columns` of the first `rows` rows of `of`, which are of the same kind,
    /// transposed. `first` is even.
    pub(crate) fn pack_turned(&mut self, of: &Rows, rows: usize, first: usize, columns: usize) {
        assert!(of.step == 1 && rows <= of.rows && first + columns <= of.columns, "columns of another shape");
        self.reserve(columns, rows);
        (self.row, self.step) = (1, columns);
        if columns == 0 {
            return;
        }
        match (&mut self.numbers, &of.numbers) {
            (Numbers::Whole(numbers), Numbers::Whole(of_numbers))
            | (Numbers::Rounded(numbers), Numbers::Rounded(of_numbers)) => {
                copy(numbers, (0..rows).map(|row| &of_numbers[row * of.row + first..][..columns]));
            }
            (Numbers::Paired(pairs), Numbers::Paired(of_pairs)) => {
                interleave_pairs(of_pairs, of.row, rows, first..first + columns, pairs, columns);
            }
            _ => unreachable!("both operands of a product are of one kind"),
        }
    }

    /// What the numbers are multiplied in.
    pub(crate) fn precision(&self) -> Precision {
        if matches!(self.numbers, Numbers::Whole(_)) { Precision::F32 } else { Precision::Bf16 }
    }

    /// The numbers from row `first` on.
    pub(crate) fn operand(&self, first: usize) -> Operand<'_> {
        self.numbers.operand(first * self.row, self.row, self.step, self.steps)
    }

    /// The numbers `columns` of `rows`. Both ends of `columns` are even.
    pub(crate) fn operand_of(&self, rows: &Range<usize>, columns: &Range<usize>) -> Operand<'_> {
        assert!(self.step == 1 && rows.end <= self.rows && columns.end <= self.columns, "columns of another shape");
        assert!(columns.start.is_multiple_of(2) && columns.end.is_multiple_of(2), "columns that cut a pair");
        let unit = self.numbers.per_step();
        self.numbers.operand(rows.start * self.row + columns.start / unit, self.row, 1, columns.len() / unit)
    }
}

/// Some rows of a left operand, to write.
#[derive(Debug)]
pub(crate) struct RowsMut<'a> {
    columns: usize,
    steps: usize,
    numbers: NumbersMut<'a>,
}

#[derive(Debug)]
enum NumbersMut<'a> {
    Whole(&'a mut [f32]),
    Rounded(&'a mut [f32]),
    Paired(&'a mut [u32]),
}

impl RowsMut<'_> {
    /// Replaces the rows from `first` on by those of `rows`, whose numbers lie side by side.
    pub(crate) fn store(&mut self, first: usize, rows: Matrix<'_>) {
        assert!(rows.columns == self.columns && rows.column_stride == 1, "rows of another shape");
        let lines = (0..rows.rows).map(|row| &rows.data[row * rows.row_stride..][..rows.columns]);
        let (from, len) = (first * self.steps, rows.rows * self.steps);
        match &mut self.numbers {
            NumbersMut::Whole(numbers) => copy(&mut numbers[from..], lines),
            NumbersMut::Rounded(numbers) => {
                copy(&mut numbers[from..], lines);
                round_all(&mut numbers[from..from + len]);
            }
            NumbersMut::Paired(pairs) => {
                pair_up(rows.data, rows.row_stride, (rows.rows, rows.columns), &mut pairs[from..from + len]);
            }
        }
    }

    /// The rows as a left operand.
    pub(crate) fn operand(&self) -> Operand<'_> {
        let (row, step, steps) = (self.steps, 1, self.steps);
        match &self.numbers {
            NumbersMut::Whole(data) | NumbersMut::Rounded(data) => Operand::Whole(Left { data, row, step, steps }),
            NumbersMut::Paired(data) => Operand::Paired(Left { data, row, step, steps }),
        }
    }
}

/// Writes lines side by side.
fn copy<'a>(numbers: &mut [f32], lines: impl Iterator<Item = &'a [f32]>) {
    let mut rest = numbers;
    for line in lines {
        let (numbers, after) = rest.split_at_mut(line.len());
        numbers.copy_from_slice(line);
        rest = after;
    }
}
