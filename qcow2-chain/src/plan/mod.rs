//! `plan`: which neighbouring layers to merge.

mod commands;
mod goals;
mod merge;
mod nodes;
mod segments;
mod warnings;

use std::io::{self, Write};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::chain::{Chain, End, Kind};
use crate::cli::{Method, Output, Plan};
use crate::model::figure::Figure;
use crate::model::shape::Shape;
use crate::survey::{LayerFigures, Piece};
use crate::text::{self, Progress, bytes, printable};
use commands::Commands;
use goals::{Cost, Costs, Goals, merged};
use merge::{Group, Limits, merge};
use nodes::Nodes;
use segments::{Segment, Segments};

/// `plan` found no way to reach the goal.
const UNREACHED: u8 = 5;
/// Stretches of data that are held in memory.
const MAX_SEGMENTS: usize = 20_000_000;

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
struct Report {
    image: String,
    goal_reached: bool,
    /// Bytes that the merges copy.
    bytes_to_copy: u64,
    /// Bytes of the files that are not needed afterwards, less what those that
    /// stay grow by, as far as clusters tell.
    bytes_freed: i64,
    before: State,
    after: State,
    /// Where a goal needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    predicted: Option<Costs>,
    /// What is lost, or has to be done besides.
    warnings: Vec<String>,
    /// In the order in which they are to be carried out.
    merges: Vec<Merge>,
}

/// The chain before or after.
#[derive(Serialize)]
struct State {
    layers: usize,
    /// Of the bytes of data that the guest sees.
    mean_depth: f64,
    /// L2 tables of all layers: what unpatched QEMU caches at most.
    l2_table_bytes: u64,
}

/// One merge.
#[derive(Serialize)]
struct Merge {
    /// Depths before anything was merged.
    top: usize,
    bottom: usize,
    layers: usize,
    /// Everything goes into the lowest layer, or into the topmost one.
    method: &'static str,
    bytes: u64,
    /// Zeroes that are not among them. A job or a commit makes zero clusters of
    /// them; `qemu-img rebase` writes them as data, but for what the new backing
    /// file has of them.
    zero_bytes: u64,
    /// The depth of the layer that stays.
    #[serde(skip)]
    kept: usize,
    /// Its file.
    into: String,
    /// The files that are not needed afterwards.
    dropped: Vec<String>,
    commands: Commands,
}

/// Carries the command out; the result is the exit code.
pub fn run(args: &Plan) -> Result<u8> {
    let goals = Goals::new(args)?;
    let chain = Chain::open(&args.image, &args.common.policy()?)?;
    ensure!(
        matches!(chain.end, End::Complete),
        "the chain is not complete: {}",
        chain.end
    );
    let nodes = match &args.qmp {
        Some(socket) => Some(
            Nodes::ask(socket, args.common.quiet, &chain, args.device.as_deref())
                .with_context(|| format!("the program that listens on {}", socket.display()))?,
        ),
        None => None,
    };
    let (layers, figures, shape) = read(&chain, args.common.quiet)?;
    let count = layers.len();
    // The layers from `first` up to `last`, which is not one of them, may be merged.
    let first = args.keep_last.unwrap_or(0).min(count);
    let writable = |depth: usize| matches!(chain.layers[depth].kind, Kind::Qcow2(_));
    let base_stays = !args.into_base || !writable(count - 1);
    let last = (count - usize::from(base_stays)).max(first);
    let mut limits = Limits {
        depth: args.depth.unwrap_or(match args.keep_last {
            Some(_) => first + 1 + usize::from(base_stays),
            // As little as the other goals take.
            None if goals.is_some() => count,
            None => 1,
        }),
        bytes: args.max_bytes.unwrap_or(u64::MAX),
        method: args.method,
    };
    let taken: Vec<_> = (chain.layers.iter().zip(&layers))
        .map(|(layer, data)| {
            layer
                .qcow2()
                .map_or(0, |q| data.data_clusters(q.cluster_size))
        })
        .collect();
    let groups = layers.into_iter().enumerate().take(last).skip(first);
    let size = |depth: usize| chain.layers[depth].disk_size().unwrap_or(0);
    let groups: Vec<_> = groups
        .map(|(depth, layer)| {
            let group = Group::new(depth, size(depth), layer);
            match chain.layers[depth].qcow2() {
                Some(image) if image.version < 3 => group.without_zeroes(),
                _ => group,
            }
        })
        .collect();
    let fixed = count - (last - first);
    let mut reached = true;
    if let Some((goals, _)) = &goals {
        let enough = |depth: usize| {
            let limits = Limits { depth, ..limits };
            goals.reached(&merged(&shape, &merge(groups.clone(), fixed, limits)))
        };
        (limits.depth, reached) = longest(limits.depth, &enough);
    }
    let groups = merge(groups, fixed, limits);
    warnings::refuse_damage(&chain, &figures, &groups)?;
    let sources = (&chain, nodes.as_ref());
    let mut report = report(args, sources, (&figures, &taken), &groups, fixed, limits);
    report.goal_reached &= reached;
    if let Some((goals, warnings)) = goals {
        report.predicted = Some(goals.costs(&shape, &merged(&shape, &groups), warnings));
    }
    match args.common.output {
        Output::Json => text::print_json(&report)?,
        Output::Table => text::unless_closed(print(&report))?,
    }
    Ok(if report.goal_reached { 0 } else { UNREACHED })
}

/// The longest chain of at most `most` layers that is short enough, and
/// whether there is one: the shorter the better it is.
fn longest(most: usize, enough: &dyn Fn(usize) -> bool) -> (usize, bool) {
    if enough(most) {
        return (most, true);
    }
    if !enough(1) {
        return (1, false);
    }
    let (mut good, mut bad) = (1, most);
    while bad - good > 1 {
        let next = good.midpoint(bad);
        if enough(next) {
            good = next;
        } else {
            bad = next;
        }
    }
    (good, true)
}

/// What each layer decides.
fn read(chain: &Chain, quiet: bool) -> Result<(Vec<Segments>, Vec<LayerFigures>, Shape)> {
    let mut layers = vec![Segments::default(); chain.layers.len()];
    let mut total = 0;
    let bar = Progress::new("reading tables", layers.len(), quiet);
    let (shape, found) = Shape::of(
        chain,
        &mut |piece: Piece| {
            // Visible parts are told as well, and are no more.
            if !piece.visible && total < MAX_SEGMENTS {
                let layer: &mut Segments = &mut layers[piece.depth];
                let before = layer.len();
                layer.push(Segment {
                    start: piece.start,
                    end: piece.start + piece.len,
                    data: piece.data,
                });
                total += layer.len() - before;
            }
        },
        &mut |done| bar.at(done),
    )?;
    ensure!(
        total < MAX_SEGMENTS,
        "more than {MAX_SEGMENTS} stretches of data: too fragmented to plan"
    );
    Ok((layers, found.layers, shape))
}

fn report(
    args: &Plan,
    (chain, nodes): (&Chain, Option<&Nodes>),
    (figures, taken): (&[LayerFigures], &[u64]),
    groups: &[Group],
    fixed: usize,
    limits: Limits,
) -> Report {
    let file = |depth: usize| chain.layers[depth].real.display().to_string();
    let mut merges = Vec::new();
    let mut freed = 0i64;
    let mut saved_tables = 0;
    // Layers that become one with the layer above of them.
    let mut joined = vec![false; chain.layers.len()];
    // The file right below the group, as it is when those below are merged:
    // from the bottom up, every command finds the chain as it expects it.
    let last = groups.last().map_or(0, |group| group.bottom);
    let mut below = Some(last + 1).filter(|depth| *depth < chain.layers.len());
    for group in groups.iter().rev() {
        if group.layers() == 1 {
            below = Some(group.top);
            continue;
        }
        let method = group.method(args.method).unwrap_or(Method::Stream);
        let (into, bytes) = match method {
            Method::Stream => (group.top, group.stream_bytes()),
            _ => (group.bottom, group.commit_bytes()),
        };
        let zero_bytes = match (method, below) {
            (Method::Stream, Some(_)) => group.stream_zero_bytes(),
            // Without a backing file there is nothing for zeroes to hide.
            _ => 0,
        };
        let dropped: Vec<_> = (group.top..=group.bottom).filter(|d| *d != into).collect();
        let cluster = |depth: usize| chain.layers[depth].qcow2().map_or(0, |q| q.cluster_size);
        for depth in &dropped {
            freed += chain.layers[*depth].file.allocated as i64;
            saved_tables += figures[*depth].l2_tables * cluster(*depth);
        }
        // Copies are not compressed, and take clusters of the file that stays.
        let kept = group.kept(method).data_clusters(cluster(into).max(1));
        freed -= kept as i64 - taken[into] as i64;
        joined[group.top + 1..=group.bottom].fill(true);
        merges.push(Merge {
            top: group.top,
            bottom: group.bottom,
            layers: group.layers(),
            method: match method {
                Method::Stream => "stream",
                _ => "commit",
            },
            bytes,
            zero_bytes,
            kept: into,
            into: file(into),
            dropped: dropped.into_iter().map(file).collect(),
            commands: Commands::new(
                args,
                (chain, nodes),
                (group.top, group.bottom, below),
                method,
            ),
        });
        below = Some(into);
    }
    let tables = |figures: &LayerFigures, depth: usize| {
        figures.l2_tables * chain.layers[depth].qcow2().map_or(0, |q| q.cluster_size)
    };
    let all_tables = figures.iter().enumerate().map(|(d, f)| tables(f, d)).sum();
    let mean = |joined: &dyn Fn(usize) -> bool| {
        let (mut depth, mut weighted) = (0, 0.0);
        for (at, layer) in figures.iter().enumerate() {
            depth += usize::from(at > 0 && !joined(at));
            weighted += depth as f64 * layer.visible_bytes as f64;
        }
        let visible: u64 = figures.iter().map(|layer| layer.visible_bytes).sum();
        weighted / visible.max(1) as f64
    };
    let layers = groups.len() + fixed;
    Report {
        image: args.image.display().to_string(),
        goal_reached: args.depth.is_none_or(|_| layers <= limits.depth)
            && args.keep_last.is_none_or(|_| layers <= limits.depth),
        bytes_to_copy: merges.iter().map(|merge| merge.bytes).sum(),
        bytes_freed: freed,
        before: State {
            layers: chain.layers.len(),
            mean_depth: mean(&|_| false),
            l2_table_bytes: all_tables,
        },
        after: State {
            layers,
            mean_depth: mean(&|depth| joined[depth]),
            l2_table_bytes: all_tables - saved_tables,
        },
        predicted: None,
        warnings: warnings::of(args, chain, groups, limits.depth < layers, &merges),
        merges,
    }
}

fn print(report: &Report) -> Result<()> {
    let out = &mut io::stdout().lock();
    let (before, after) = (&report.before, &report.after);
    writeln!(
        out,
        "{}: {} layers, {} after {} merges that copy {}",
        printable(&report.image),
        before.layers,
        after.layers,
        report.merges.len(),
        bytes(report.bytes_to_copy)
    )?;
    writeln!(
        out,
        "mean depth of data {:.1} -> {:.1}; L2 tables {} -> {}; files {} by {}",
        before.mean_depth,
        after.mean_depth,
        bytes(before.l2_table_bytes),
        bytes(after.l2_table_bytes),
        if report.bytes_freed < 0 {
            "larger"
        } else {
            "smaller"
        },
        bytes(report.bytes_freed.unsigned_abs())
    )?;
    if let Some(costs) = &report.predicted {
        let read = |cost: &Cost| match cost.read_microseconds {
            Some(value) => Figure::ReadData.show(value),
            None => "no read".into(),
        };
        let memory = |cost: &Cost| cost.memory_bytes.map_or("unknown".into(), bytes);
        let (before, after) = (&costs.before, &costs.after);
        writeln!(
            out,
            "{}, predicted: 4 KiB read of data {} -> {}; memory {} -> {}",
            costs.driver.name(),
            read(before),
            read(after),
            memory(before),
            memory(after)
        )?;
        for warning in &costs.warnings {
            writeln!(out, "Not to be relied on: {}", printable(warning))?;
        }
    }
    if !report.goal_reached {
        writeln!(out, "The goal is not reached with these limits.")?;
    }
    if !report.merges.is_empty() {
        writeln!(
            out,
            "To be carried out in this order, by QMP or virsh where a program has the chain open, else\n\
             by qemu-img. No other image may have one of these layers as its backing file. By QMP wait for\n\
             BLOCK_JOB_READY before job-complete, and for BLOCK_JOB_COMPLETED before what comes next."
        )?;
    }
    for warning in &report.warnings {
        writeln!(out, "Note: {}", printable(warning))?;
    }
    for merge in &report.merges {
        let how = match merge.method {
            "stream" => "stream into the topmost",
            _ => "commit into the lowest",
        };
        writeln!(
            out,
            "\ndepth {} to {}: {how} of {} layers, {}, {}",
            merge.top,
            merge.bottom,
            merge.layers,
            printable(&merge.into),
            bytes(merge.bytes)
        )?;
        if merge.zero_bytes > 0 {
            writeln!(
                out,
                "  by qemu-img also zeroes are written as data: up to {}",
                bytes(merge.zero_bytes)
            )?;
        }
        let (first, last) = (merge.dropped.first(), merge.dropped.last());
        if let (Some(first), Some(last)) = (first, last) {
            let (first, last) = (printable(first), printable(last));
            match merge.dropped.len() {
                1 => writeln!(out, "  not needed afterwards: {first}")?,
                count => writeln!(
                    out,
                    "  not needed afterwards: {first} to {last}, {count} files"
                )?,
            }
        }
        for (name, lines) in merge.commands.each() {
            let shown = match name {
                "QMP" => text::printable_json,
                _ => text::printable_shell,
            };
            for line in lines {
                writeln!(out, "  {name:<9} {}", shown(line))?;
            }
        }
    }
    Ok(())
}
