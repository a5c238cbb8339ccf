//! `top` and `metrics`: what a running guest or storage daemon does with its
//! chains.

mod metrics;
mod qmp;
mod sample;

use std::io::{self, ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cli::{Metrics, Output, Top};
use crate::text::{self, bytes, percent, printable};
pub use qmp::Qmp;
pub use sample::items;
use sample::{ChainSample, Sample};

/// Carries `metrics` out.
pub fn metrics(args: &Metrics) -> Result<()> {
    let sample = Sample::take(&mut Qmp::connect(&args.socket, args.quiet)?)?;
    text::print(&metrics::format(&sample))
}

/// Carries `top` out.
pub fn top(args: &Top) -> Result<()> {
    let mut qmp = Qmp::connect(&args.socket, args.quiet)?;
    let interval = Duration::from_secs_f64(args.interval.clamp(0.05, 86_400.0));
    let mut before: Option<(Instant, Sample)> = None;
    let mut taken = 0;
    loop {
        let (now, sample) = (Instant::now(), Sample::take(&mut qmp)?);
        let mut out = io::stdout().lock();
        let text = match args.output {
            Output::Json => format!("{}\n", serde_json::to_string(&sample)?),
            Output::Table => {
                let last = before
                    .as_ref()
                    .map(|(then, old)| (old, now.duration_since(*then).as_secs_f64()));
                let page = page(&sample, last);
                // One write, so that nothing flickers.
                let home = if out.is_terminal() && args.count != Some(1) {
                    "\x1b[H\x1b[J"
                } else {
                    ""
                };
                format!("{home}{page}")
            }
        };
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("cannot write the result")?,
        }
        drop(out);
        taken += 1;
        if args.count.is_some_and(|count| taken >= count) {
            return Ok(());
        }
        before = Some((now, sample));
        std::thread::sleep(interval.saturating_sub(now.elapsed()));
    }
}

fn page(sample: &Sample, before: Option<(&Sample, f64)>) -> String {
    let mut out = Vec::new();
    // Writing to memory does not fail.
    let _ = page_to(&mut out, sample, before);
    String::from_utf8_lossy(&out).into_owned()
}

fn page_to(out: &mut Vec<u8>, sample: &Sample, before: Option<(&Sample, f64)>) -> io::Result<()> {
    if sample.chains.is_empty() {
        writeln!(out, "No node here has the driver rqcow2.")?;
    }
    for chain in &sample.chains {
        let old = before.and_then(|(old, seconds)| {
            let chain = old.chains.iter().find(|other| other.node == chain.node)?;
            Some((chain, seconds))
        });
        one(out, chain, old)?;
    }
    if !sample.jobs.is_empty() {
        let mut table = text::table(&["job", "type", "state", "done"], &[0, 1, 2]);
        for job in &sample.jobs {
            table.add_row([
                printable(&job.id),
                printable(&job.kind),
                printable(&job.status),
                percent(crate::survey::ratio(
                    job.current_progress,
                    job.total_progress,
                )),
            ]);
        }
        text::print_table(out, &table)?;
    }
    Ok(())
}

fn one(out: &mut Vec<u8>, chain: &ChainSample, old: Option<(&ChainSample, f64)>) -> io::Result<()> {
    let driver = &chain.driver;
    // Since the last look, or since the image was opened.
    let since = |of: &dyn Fn(&ChainSample) -> u64| {
        of(chain).saturating_sub(old.map_or(0, |(old, _)| of(old)))
    };
    writeln!(
        out,
        "{}: {} layers, memory {} of {} (index {})",
        printable(&chain.node),
        driver.layers,
        bytes(driver.cache_bytes),
        bytes(driver.cache_limit),
        bytes(driver.index_bytes)
    )?;
    if let Some((_, seconds)) = old {
        let rate = |of: &dyn Fn(&ChainSample) -> u64| since(of) as f64 / seconds.max(1e-9);
        writeln!(
            out,
            "  read  {:>9.0}/s {:>10}/s    write {:>9.0}/s {:>10}/s",
            rate(&|c| c.requests.reads),
            bytes(rate(&|c| c.requests.read_bytes) as u64),
            rate(&|c| c.requests.writes),
            bytes(rate(&|c| c.requests.written_bytes) as u64)
        )?;
    }
    let (hits, misses) = (since(&|c| c.driver.hits), since(&|c| c.driver.misses));
    writeln!(
        out,
        "  lookups {}: {} from memory; {} parts of the index filled, {} of tables read",
        hits + misses,
        percent(crate::survey::ratio(hits, hits + misses)),
        since(&|c| c.driver.merged_slices),
        since(&|c| c.driver.table_reads)
    )?;
    let mut table = text::table(&["  depth", "extents", "share", ""], &[3]);
    let mut rows = Vec::new();
    for class in 0..driver.reads_by_depth.len() {
        let count = since(&|c| c.driver.reads_by_depth.get(class).copied().unwrap_or(0));
        rows.push((metrics::class_name(class), count));
    }
    rows.push(("zero".into(), since(&|c| c.driver.zero_reads)));
    rows.push(("nowhere".into(), since(&|c| c.driver.below_reads)));
    let all: u64 = rows.iter().map(|(_, count)| count).sum();
    for (name, count) in rows {
        let share = crate::survey::ratio(count, all);
        let bar = "#".repeat((share * 40.0).round() as usize);
        table.add_row([name, count.to_string(), percent(share), bar]);
    }
    text::print_table(out, &table)
}
