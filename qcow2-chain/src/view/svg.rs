//! The picture: one row a layer, the disk from left to right. The strip on
//! top is the disk as the guest sees it, in the colours of the layers.

use std::fmt::Write;

use super::grid::{Grid, Shade};
use super::report::Report;
use crate::text::bytes;

/// Colours of depth, from the top down (dark to light blue-green).
const COLOURS: [&str; 8] = [
    "#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725",
];
const SHADOWED: &str = "#c9c9c9";
const ZERO: &str = "#f3d9dc";
const WIDTH: usize = 1024;
const LEFT: usize = 56;
const TOP: usize = 54;
const STRIP: usize = 14;

/// Text that is safe in XML and HTML.
pub fn escaped(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for c in crate::text::printable(text).chars() {
        match c {
            '&' => result.push_str("&amp;"),
            '<' => result.push_str("&lt;"),
            '>' => result.push_str("&gt;"),
            '"' => result.push_str("&quot;"),
            '\'' => result.push_str("&#39;"),
            c => result.push(c),
        }
    }
    result
}

/// The colour of a row.
fn colour(row: usize, rows: usize) -> &'static str {
    COLOURS[row * COLOURS.len() / rows.max(1)]
}

/// Pixels that a row is high.
fn row_height(rows: usize) -> usize {
    (560 / rows.max(1)).clamp(2, 18)
}

/// A file of its own.
pub fn document(grid: &Grid, report: &Report) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}",
        drawing(grid, report)
    )
}

/// The element.
pub fn drawing(grid: &Grid, report: &Report) -> String {
    let high = row_height(grid.rows);
    let bottom = TOP + STRIP + 8 + grid.rows * high;
    let (width, height) = (LEFT + WIDTH + 16, bottom + 40);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" role=\"img\">\n\
         <title>{}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\">{}: {} layers, disk of {}</text>",
        escaped(&report.image),
        escaped(&report.image),
        report.depth,
        bytes(report.disk_size)
    );
    legend(&mut out);
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">guest</text>",
        LEFT - 6,
        TOP + 11
    );
    strip(&mut out, grid);
    let first = TOP + STRIP + 8;
    let _ = writeln!(
        out,
        "<rect id=\"boxes\" x=\"{LEFT}\" y=\"{first}\" width=\"{WIDTH}\" height=\"{}\" \
         fill=\"#fafafa\" stroke=\"#ddd\"/>",
        grid.rows * high
    );
    boxes(&mut out, grid, first, high);
    let every = grid.rows.div_ceil(12).max(1);
    for row in (0..grid.rows).step_by(every) {
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 6,
            first + row * high + high.min(12),
            row * grid.layers_per_row
        );
    }
    for quarter in 0..=4 {
        let x = LEFT + WIDTH * quarter / 4;
        let anchor = ["start", "middle", "middle", "middle", "end"][quarter];
        let at = (u128::from(report.disk_size) * quarter as u128 / 4) as u64;
        let _ = writeln!(
            out,
            "<text x=\"{x}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
            bottom + 18,
            bytes(at)
        );
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String) {
    let mut x = LEFT;
    let mut item = |colours: &[&str], text: &str, wide: usize| {
        for colour in colours {
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"28\" width=\"10\" height=\"10\" fill=\"{colour}\"/>"
            );
            x += 10;
        }
        let _ = writeln!(out, "<text x=\"{}\" y=\"37\">{text}</text>", x + 4);
        x += wide;
    };
    item(&COLOURS, "data that the guest sees, top to base", 240);
    item(&[SHADOWED], "shadowed data", 110);
    item(&[ZERO], "zeroes", 60);
}

/// Runs of equal boxes as strokes of one path for each colour.
fn boxes(out: &mut String, grid: &Grid, first: usize, high: usize) {
    let mut paths: Vec<(&str, String)> = Vec::new();
    let unit = WIDTH / grid.columns;
    for row in 0..grid.rows {
        let paint = |column| match grid.shade(row, column) {
            Shade::Visible => Some(colour(row, grid.rows)),
            Shade::Shadowed => Some(SHADOWED),
            Shade::Zero => Some(ZERO),
            Shade::Empty => None,
        };
        let mut column = 0;
        while column < grid.columns {
            let here = paint(column);
            let mut end = column + 1;
            while end < grid.columns && paint(end) == here {
                end += 1;
            }
            if let Some(here) = here {
                let path = match paths.iter().position(|(colour, _)| *colour == here) {
                    Some(at) => &mut paths[at].1,
                    None => {
                        paths.push((here, String::new()));
                        let last = paths.len() - 1;
                        &mut paths[last].1
                    }
                };
                let _ = write!(path, "M{} {row}h{}", column * unit, (end - column) * unit);
            }
            column = end;
        }
    }
    let _ = writeln!(
        out,
        "<g transform=\"translate({LEFT} {first}) scale(1 {high}) translate(0 .5)\" \
         shape-rendering=\"crispEdges\" pointer-events=\"none\">"
    );
    for (colour, path) in paths {
        let _ = writeln!(out, "<path stroke=\"{colour}\" d=\"{path}\"/>");
    }
    out.push_str("</g>\n");
}

fn strip(out: &mut String, grid: &Grid) {
    let unit = WIDTH / grid.columns;
    let mut column = 0;
    while column < grid.columns {
        let paint = |column| grid.served(column).map(|row| colour(row, grid.rows));
        let here = paint(column);
        let mut end = column + 1;
        while end < grid.columns && paint(end) == here {
            end += 1;
        }
        let _ = writeln!(
            out,
            "<rect x=\"{}\" y=\"{TOP}\" width=\"{}\" height=\"{STRIP}\" fill=\"{}\"/>",
            LEFT + column * unit,
            (end - column) * unit,
            here.unwrap_or("#f4f4f4")
        );
        column = end;
    }
}
