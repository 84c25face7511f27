//! Columns under their headings. Its own few lines, because ten thousand containers make more cells than what can draw
//! every kind of table gets through in a second.

use std::fmt::{self, Display, Write};

/// A table with `N` columns, the cells aligned to the left.
pub struct Table<const N: usize> {
    /// All cells, row by row, one after the other.
    cells: String,
    /// Where each cell ends, in bytes.
    ends: Vec<usize>,
    /// The widest cell of each column, in characters.
    widths: [usize; N],
}

impl<const N: usize> Table<N> {
    /// A table with a row of headings.
    pub fn new(headings: [&str; N]) -> Self {
        let mut table = Self { cells: String::new(), ends: Vec::new(), widths: [0; N] };
        table.add(headings.each_ref().map(|heading| heading as &dyn Display));
        table
    }

    /// Adds a row. A cell that somebody outside had a word in stays on its line, without control characters.
    pub fn add(&mut self, row: [&dyn Display; N]) {
        for (cell, width) in row.iter().zip(&mut self.widths) {
            let begin = self.cells.len();
            // Writing to a string never fails.
            let _ = write!(self.cells, "{cell}");
            let text = &self.cells[begin..];
            let has_control = match text.is_ascii() {
                true => text.bytes().any(|byte| byte.is_ascii_control()),
                false => text.contains(char::is_control),
            };
            if has_control {
                let plain = text.replace(char::is_control, " ");
                self.cells.truncate(begin);
                self.cells += &plain;
            }
            *width = cell_width(&self.cells[begin..]).max(*width);
            self.ends.push(self.cells.len());
        }
    }

    /// Appends the lines to `text`, without the blanks at their ends.
    pub fn write(&self, text: &mut String) {
        let line: usize = self.widths.iter().map(|width| width + 2).sum();
        text.reserve(self.ends.len() / N * line);
        let mut begin = 0;
        for row in self.ends.chunks_exact(N) {
            let mut blanks = 0;
            for (end, width) in row.iter().zip(self.widths) {
                let cell = &self.cells[begin..*end];
                begin = *end;
                if !cell.is_empty() {
                    push_blanks(text, blanks);
                    text.push_str(cell);
                    blanks = 0;
                }
                blanks += width - cell_width(cell) + 2;
            }
            text.push('\n');
        }
    }
}

fn push_blanks(text: &mut String, mut count: usize) {
    const BLANKS: &str = "                                ";
    while count > 0 {
        let now = count.min(BLANKS.len());
        text.push_str(&BLANKS[..now]);
        count -= now;
    }
}

fn cell_width(cell: &str) -> usize {
    if cell.is_ascii() { cell.len() } else { cell.chars().count() }
}

/// Items as one cell: with `separator` between them, a dash for none. `write` writes one.
pub struct List<'a, T, W>(pub &'a [T], pub &'static str, pub W)
where
    W: Fn(&T, &mut fmt::Formatter<'_>) -> fmt::Result;

impl<T, W> Display for List<'_, T, W>
where
    W: Fn(&T, &mut fmt::Formatter<'_>) -> fmt::Result,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(items, separator, write) = self;
        if items.is_empty() {
            return f.write_str("-");
        }
        for (place, item) in items.iter().enumerate() {
            if place > 0 {
                f.write_str(separator)?;
            }
            write(item, f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_headings() {
        let mut table = Table::new(["NAME", "ITEMS", "LAST"]);
        let number = |n: &u32, f: &mut fmt::Formatter<'_>| write!(f, "#{n}");
        table.add([&"é", &List(&[1, 20], ", ", number), &"x\u{1b}y"]);
        table.add([&"", &List(&[], ", ", number), &""]);
        let mut text = String::from("before\n");
        table.write(&mut text);
        assert_eq!(text, "before\nNAME  ITEMS    LAST\né     #1, #20  x y\n      -\n");
    }
}
