//! Memory that begins at the border of a cache line: a register that is read or written across one costs two accesses.

use std::ops::{Deref, DerefMut};

use aligned_vec::{AVec, ConstAlign};

/// A vector whose first element lies at the border of a cache line, empty by [`Default`], which [`AVec`] lacks.
#[derive(Debug)]
pub struct Lines<T>(AVec<T, ConstAlign<64>>);

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Lines(AVec::new(0))
    }
}

impl<T: Clone> From<&[T]> for Lines<T> {
    fn from(numbers: &[T]) -> Self {
        Lines(AVec::from_slice(0, numbers))
    }
}

impl<T> Deref for Lines<T> {
    type Target = AVec<T, ConstAlign<64>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
