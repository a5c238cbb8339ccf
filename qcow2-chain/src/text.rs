//! What people read: sizes, tables, progress, and names that cannot play
//! tricks on a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// A number of bytes for a person.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value >= 99.95 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A share as per cent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Names come from images: no control characters reach the terminal, nor those
/// that turn the direction of text, nor ends of lines, as the next one would
/// pass for ours.
pub fn printable(text: &str) -> String {
    spelled(text, |_| "\u{fffd}".into())
}

/// A command of a shell, the same for the shell it is pasted into. What is not
/// printable is in quotes there (see `quoted`).
pub fn printable_shell(command: &str) -> String {
    let octal = |byte: &u8| format!("\\{byte:03o}");
    spelled(command, |c| {
        let bytes = c
            .to_string()
            .as_bytes()
            .iter()
            .map(octal)
            .collect::<String>();
        format!("'$'{bytes}''")
    })
}

/// JSON, the same for who reads it.
pub fn printable_json(json: &str) -> String {
    spelled(json, |c| format!("\\u{:04x}", u32::from(c)))
}

/// The text with other words for what is not printable.
fn spelled(text: &str, spell: impl Fn(char) -> String) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
    };
    let mut result = String::with_capacity(text.len());
    for c in text.chars() {
        match hidden(c) {
            true => result.push_str(&spell(c)),
            false => result.push(c),
        }
    }
    result
}

/// A word for a shell.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/+=:,@%".contains(c);
    // A leading dash would be an option.
    let word = if word.starts_with('-') {
        format!("./{word}")
    } else {
        word.to_owned()
    };
    if !word.is_empty() && word.chars().all(plain) {
        word
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// A table without lines; `left` columns are text, the others numbers.
pub fn table(header: &[&str], left: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for (number, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if !left.contains(&number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Prints a table, without spaces at the ends of its lines.
pub fn print_table(out: &mut dyn Write, table: &Table) -> io::Result<()> {
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Prints JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Prints the result.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    unless_closed(written.context("cannot write the result"))
}

/// The result is the same, and with it the exit code, when nobody wants to read
/// it to its end: `qcow2-chain view ... | head`.
pub fn unless_closed(printed: Result<()>) -> Result<()> {
    match printed {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

/// Says something beside the result, where somebody can be told.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Whether the reader of the output has gone.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let json = cause.downcast_ref::<serde_json::Error>();
        io.or_else(|| json.and_then(serde_json::Error::io_error_kind))
            == Some(io::ErrorKind::BrokenPipe)
    })
}

/// A bar on the terminal that appears only when it takes long.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// A bar for `total` steps; none where nobody looks.
    pub fn new(what: &'static str, total: usize, quiet: bool) -> Self {
        if quiet || !io::stderr().is_terminal() {
            return Self(None);
        }
        let style = ProgressStyle::with_template("{msg} {bar:40} {pos}/{len} {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total as u64)
            .with_style(style)
            .with_message(what);
        bar.enable_steady_tick(Duration::from_millis(250));
        Self(Some(bar))
    }

    /// So many steps are done.
    pub fn at(&self, done: usize) {
        if let Some(bar) = &self.0 {
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_people() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(65536), "64 KiB");
        assert_eq!(bytes(1_500_000), "1.4 MiB");
        assert_eq!(bytes(1 << 40), "1 TiB");
        assert_eq!(bytes(u64::MAX), "16 EiB");
        assert_eq!(percent(0.1234), "12.3 %");
    }

    #[test]
    fn names_are_harmless() {
        assert_eq!(printable("a\x1b[2Jb\u{202e}c"), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(printable("a\nb"), "a\u{fffd}b");
        let word = quoted("a\tb\u{202e}c");
        assert_eq!(printable_shell(&word), r"'a'$'\011''b'$'\342\200\256''c'");
        assert_eq!(printable_json("\"a\u{7f}\""), r#""a\u007f""#);
        assert_eq!(quoted("a/b.qcow2"), "a/b.qcow2");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted("-rf"), "./-rf");
        assert_eq!(quoted(""), "''");
    }
}
