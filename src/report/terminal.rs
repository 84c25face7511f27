//! What is shown again and again in the same place of a terminal.

use std::io::Write;
use std::os::fd::AsFd;

use crate::sys;

/// Prints over what is on the terminal, as much as it has room for; all of it, one after the other, where standard output
/// is no terminal. False if the reader is gone.
pub fn print_in_place(text: &str) -> bool {
    let mut output = std::io::stdout();
    // Asked each time: windows change.
    let page = match sys::terminal_size(output.as_fd()) {
        Some((rows, columns)) => in_place(text, usize::from(rows), usize::from(columns)),
        None => format!("{text}\n"),
    };
    output.write_all(page.as_bytes()).and_then(|()| output.flush()).is_ok()
}

/// The text over what the terminal shows (ECMA-48). It must not scroll: the next one would begin below this one's start.
/// A terminal that does not know its size has 0 rows and columns, and gets everything.
fn in_place(text: &str, rows: usize, columns: usize) -> String {
    let rest;
    let mut lines: Vec<&str> = text.lines().flat_map(|line| folded(line, columns)).collect();
    // The cursor comes to stand in the last row.
    let room = if rows == 0 { usize::MAX } else { rows - 1 };
    if lines.len() > room {
        let shown = room.saturating_sub(1);
        rest = format!("... {} more lines", lines.len() - shown);
        lines.truncate(shown);
        lines.extend(folded(&rest, columns).take(room - shown));
    }
    // Each row is erased before it is written: after a full one, the cursor is still on its last letter.
    let rows: String = lines.iter().flat_map(|line| ["\x1b[K", line, "\n"]).collect();
    format!("\x1b[H{rows}\x1b[J")
}

/// The line in pieces of as many characters as a row has; all of it if that is 0.
fn folded(line: &str, columns: usize) -> impl Iterator<Item = &str> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let line = rest?;
        let end = line.char_indices().nth(columns).filter(|_| columns > 0).map(|(end, _)| end);
        let (piece, after) = end.map_or((line, None), |end| (&line[..end], Some(&line[end..])));
        rest = after;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a terminal of that size shows after one text and then another, a line for each row.
    fn shown(texts: &[&str], rows: usize, columns: usize) -> Vec<String> {
        let mut screen = vec![vec![' '; columns]; rows];
        let (mut row, mut column) = (0, 0);
        for text in texts {
            let page = in_place(text, rows, columns);
            let mut rest = page.as_str();
            while let Some(letter) = rest.chars().next() {
                if let Some(after) = rest.strip_prefix("\x1b[H") {
                    (row, column, rest) = (0, 0, after);
                } else if let Some(after) = rest.strip_prefix("\x1b[K") {
                    assert!(column < columns, "a full row is erased");
                    screen[row][column..].fill(' ');
                    rest = after;
                } else if let Some(after) = rest.strip_prefix("\x1b[J") {
                    screen[row][column..].fill(' ');
                    screen[row + 1..].iter_mut().for_each(|row| row.fill(' '));
                    rest = after;
                } else {
                    if letter == '\n' {
                        (row, column) = (row + 1, 0);
                        assert!(row < rows, "it scrolls: {page:?}");
                    } else {
                        assert!(column < columns, "the terminal folds: {page:?}");
                        screen[row][column] = letter;
                        column += 1;
                    }
                    rest = &rest[letter.len_utf8()..];
                }
            }
        }
        screen.iter().map(|row| row.iter().collect::<String>().trim_end().to_owned()).collect()
    }

    #[test]
    fn a_text_takes_the_place_of_the_one_before() {
        assert_eq!(shown(&["one\ntwo\nthree\n"], 5, 6), ["one", "two", "three", "", ""]);
        assert_eq!(shown(&["one\ntwo\nthree\n", "zw\n"], 5, 6), ["zw", "", "", "", ""]);
        // A full row, and one that is folded.
        assert_eq!(shown(&["sixsix\nover and out\n"], 5, 6), ["sixsix", "over a", "nd out", "", ""]);
        assert_eq!(shown(&["over and out\n", "é\n\nsix\n"], 5, 6), ["é", "", "six", "", ""]);
    }

    #[test]
    fn a_text_that_has_no_room_is_cut_and_says_so() {
        let text = "1\n2\n3\n4\n5\n6\n";
        assert_eq!(shown(&[text], 7, 20), ["1", "2", "3", "4", "5", "6", ""]);
        assert_eq!(shown(&[text], 6, 20), ["1", "2", "3", "4", "... 2 more lines", ""]);
        assert_eq!(shown(&[text, text], 3, 20), ["1", "... 5 more lines", ""]);
        assert_eq!(shown(&[text], 2, 6), ["... 6", ""]);
        assert_eq!(shown(&[text], 1, 20), [""]);
        // Of unknown size.
        assert_eq!(in_place("a\nb\n", 0, 0), "\x1b[H\x1b[Ka\n\x1b[Kb\n\x1b[J");
    }
}
