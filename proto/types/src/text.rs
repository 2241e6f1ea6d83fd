//! Text that a person will read.

use std::fmt;

/// Makes text safe to print on a terminal and to append to a log: one line of at most `limit` characters, without
/// control characters, escape sequences, or marks that reorder the text after them.
pub fn for_people(text: &str, limit: usize) -> String {
    let mut shown = String::with_capacity(text.len().min(4 * limit));
    let mut count = 0;
    let mut blank = true;
    for char in text.chars().map(|char| if char.is_control() { ' ' } else { char }) {
        if reorders(char) || (char == ' ' && blank) {
            continue;
        }
        if count == limit {
            shown.push('…');
            return shown;
        }
        blank = char == ' ';
        shown.push(char);
        count += 1;
    }
    shown.truncate(shown.trim_end().len());
    shown
}

/// Whether a character is an invisible mark that changes the order or the look of the text around it.
const fn reorders(char: char) -> bool {
    matches!(char, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A number with its noun: `1 unit`, `2 units`. For nouns whose plural ends in `s`.
pub fn counted<N: fmt::Display + Copy + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    let ending = if count == N::from(1) { "" } else { "s" };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_singular() {
        let units = [0_u64, 1, 2].map(|count| counted(count, "unit"));
        assert_eq!(units, ["0 units", "1 unit", "2 units"]);
    }

    #[test]
    fn a_terminal_gets_one_line_without_commands() {
        assert_eq!(for_people("a\x1b]0;title\x07\x1b[2Jb\r\nc", 100), "a ]0;title [2Jb c");
        assert_eq!(for_people("\u{9b}31mred\u{202e}der", 100), "31mredder");
        assert_eq!(for_people("  two  words \n", 100), "two words");
        assert_eq!(for_people("äöü…", 3), "äöü…");
        assert_eq!(for_people(&"x".repeat(1000), 4), "xxxx…");
    }
}
