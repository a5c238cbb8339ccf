//! `view`: a chain in one call.

mod grid;
mod html;
mod report;
mod svg;

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::chain::Chain;
use crate::cli::{Output, View};
use crate::survey::{ratio, survey};
use crate::text::{self, Progress, bytes, percent, printable};
use grid::Grid;
use report::{DepthShare, LayerReport, Report};

/// Carries the command out.
pub fn run(args: &View) -> Result<()> {
    let chain = Chain::open(&args.image, &args.common.policy()?)?;
    for path in args.svg.iter().chain(&args.html) {
        spare_layers(path, &chain)?;
    }
    let mut grid = (args.svg.is_some() || args.html.is_some()).then(|| Grid::new(&chain));
    let bar = Progress::new("reading tables", chain.layers.len(), args.common.quiet);
    let survey = survey(
        &chain,
        &mut |piece| {
            if let Some(grid) = &mut grid {
                grid.add(&piece);
            }
        },
        &mut |done| bar.at(done),
    )?;
    drop(bar);
    let report = Report::new(&chain, survey);
    if let (Some(path), Some(grid)) = (&args.svg, &grid) {
        write(path, &svg::document(grid, &report))?;
    }
    if let (Some(path), Some(grid)) = (&args.html, &grid) {
        write(path, &html::page(grid, &report)?)?;
    }
    match args.common.output {
        Output::Json => text::print_json(&report),
        Output::Table => text::unless_closed(print(&report, args.rows)),
    }
}

/// Refuses to write into a file that is a layer of the chain.
fn spare_layers(path: &Path, chain: &Chain) -> Result<()> {
    let Ok(found) = path.metadata() else {
        return Ok(());
    };
    let id = (found.dev(), found.ino());
    let layer = chain.layers.iter().find(|layer| layer.file.id == id);
    if let Some(layer) = layer {
        bail!(
            "{} is a layer of the chain ({}): name another file",
            path.display(),
            layer.real.display()
        );
    }
    Ok(())
}

fn write(path: &Path, content: &str) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

fn print(report: &Report, rows: usize) -> Result<()> {
    let out = &mut io::stdout().lock();
    let totals = &report.totals;
    let s = |count: usize| if count == 1 { "" } else { "s" };
    writeln!(out, "{}", printable(&report.image))?;
    writeln!(
        out,
        "{} layer{} of a disk of {}: {} of data, {} of them visible, {} shadowed ({}), tables {}",
        report.depth,
        s(report.depth),
        bytes(report.disk_size),
        bytes(totals.data_bytes),
        bytes(totals.visible_bytes),
        bytes(totals.shadowed_bytes),
        percent(ratio(totals.shadowed_bytes, totals.data_bytes)),
        bytes(totals.table_bytes),
    )?;
    if let Some(problem) = &report.end.problem {
        writeln!(out, "The chain ends early: {}", printable(problem))?;
    }
    writeln!(out)?;
    layers(out, &report.layers, rows)?;
    writeln!(out)?;
    histogram(out, report)?;
    Ok(())
}

fn layers(out: &mut dyn Write, layers: &[LayerReport], rows: usize) -> Result<()> {
    let header = [
        "depth",
        "file",
        "format",
        "file size",
        "disk",
        "data",
        "visible",
        "shadowed",
        "zeroes",
        "tables",
        "fragm.",
        "compr.",
    ];
    let mut table = text::table(&header, &[1, 2]);
    let all = rows == 0 || layers.len() <= rows;
    let tail = if all { 0 } else { rows / 2 };
    let head = if all { layers.len() } else { rows - tail };
    for (number, layer) in layers.iter().enumerate() {
        if number >= head && number < layers.len() - tail {
            if number == head {
                let left = layers.len() - head - tail;
                table.add_row(["...".into(), format!("{left} more (--rows 0)")]);
            }
            continue;
        }
        let figures = &layer.figures;
        let mark = match &figures.error {
            Some(error) => format!("{} ({})", layer.name, error),
            None => layer.name.clone(),
        };
        table.add_row([
            layer.depth.to_string(),
            printable(&mark),
            printable(&layer.format),
            bytes(layer.file_bytes),
            layer.disk_size.map_or("?".into(), bytes),
            bytes(figures.data_bytes),
            bytes(figures.visible_bytes),
            bytes(figures.shadowed_bytes),
            bytes(figures.zero_bytes),
            bytes(figures.table_bytes),
            percent(figures.fragmentation),
            figures.compressed_clusters.to_string(),
        ]);
    }
    text::print_table(out, &table)?;
    Ok(())
}

fn histogram(out: &mut dyn Write, report: &Report) -> Result<()> {
    const WIDTH: f64 = 40.0;
    writeln!(out, "Where reads are served, by depth (share of the disk):")?;
    let mut table = text::table(&["depth", "data", "zeroes", "share", ""], &[4]);
    let bar = |share: f64| "#".repeat((share * WIDTH).round() as usize);
    for DepthShare {
        from,
        to,
        data_bytes,
        zero_bytes,
        share,
    } in &report.served_by_depth
    {
        let depth = if from == to {
            from.to_string()
        } else {
            format!("{from}-{to}")
        };
        let row = [
            depth,
            bytes(*data_bytes),
            bytes(*zero_bytes),
            percent(*share),
            bar(*share),
        ];
        table.add_row(row);
    }
    let share = ratio(report.hole_bytes, report.disk_size);
    table.add_row([
        "nowhere".into(),
        "".into(),
        bytes(report.hole_bytes),
        percent(share),
        bar(share),
    ]);
    text::print_table(out, &table)?;
    Ok(())
}
