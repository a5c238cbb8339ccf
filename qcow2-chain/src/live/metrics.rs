//! The text format of Prometheus.

use std::fmt::Write;

use super::sample::{ChainSample, Sample};

/// The name of a class of depths.
pub fn class_name(class: usize) -> String {
    match class {
        0 => "0".into(),
        1 => "1".into(),
        class => {
            let from = 1u64 << (class - 1).min(62);
            format!("{from}-{}", 2 * from - 1)
        }
    }
}

/// Name, type, help and how to get it.
type Metric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&ChainSample) -> u64,
);

const METRICS: [Metric; 14] = [
    ("chain_layers", "gauge", "Images in the chain.", |c| {
        c.driver.layers
    }),
    ("index_bytes", "gauge", "Memory of the index.", |c| {
        c.driver.index_bytes
    }),
    (
        "cache_bytes",
        "gauge",
        "Memory of index and table caches.",
        |c| c.driver.cache_bytes,
    ),
    ("cache_limit_bytes", "gauge", "What that may be.", |c| {
        c.driver.cache_limit
    }),
    (
        "lookup_hits_total",
        "counter",
        "Extents that were looked up without a miss.",
        |c| c.driver.hits,
    ),
    (
        "lookup_misses_total",
        "counter",
        "Extents for which tables were read.",
        |c| c.driver.misses,
    ),
    (
        "merged_slices_total",
        "counter",
        "Parts of the index filled.",
        |c| c.driver.merged_slices,
    ),
    (
        "table_reads_total",
        "counter",
        "Parts of L2 tables read for that.",
        |c| c.driver.table_reads,
    ),
    (
        "zero_reads_total",
        "counter",
        "Extents that are zero.",
        |c| c.driver.zero_reads,
    ),
    (
        "below_reads_total",
        "counter",
        "Extents that no image has.",
        |c| c.driver.below_reads,
    ),
    ("reads_total", "counter", "Read requests.", |c| {
        c.requests.reads
    }),
    ("read_bytes_total", "counter", "Bytes read.", |c| {
        c.requests.read_bytes
    }),
    ("writes_total", "counter", "Write requests.", |c| {
        c.requests.writes
    }),
    ("written_bytes_total", "counter", "Bytes written.", |c| {
        c.requests.written_bytes
    }),
];

/// One scrape.
pub fn format(sample: &Sample) -> String {
    let mut out = String::new();
    for (name, kind, help, value) in METRICS {
        head(&mut out, name, kind, help);
        for chain in &sample.chains {
            let node = label(&chain.node);
            let _ = writeln!(out, "rqcow2_{name}{{node=\"{node}\"}} {}", value(chain));
        }
    }
    let name = "served_extents_total";
    head(
        &mut out,
        name,
        "counter",
        "Extents with data by the depth they were found at.",
    );
    for chain in &sample.chains {
        let node = label(&chain.node);
        for (class, count) in chain.driver.reads_by_depth.iter().enumerate() {
            let depth = class_name(class);
            let _ = writeln!(
                out,
                "rqcow2_{name}{{node=\"{node}\",depth=\"{depth}\"}} {count}"
            );
        }
    }
    for (name, help) in [
        ("job_progress", "How far a job is."),
        ("job_progress_end", "How far it has to go."),
    ] {
        head(&mut out, name, "gauge", help);
        for job in &sample.jobs {
            let value = if name == "job_progress" {
                job.current_progress
            } else {
                job.total_progress
            };
            let _ = writeln!(
                out,
                "rqcow2_{name}{{id=\"{}\",type=\"{}\",state=\"{}\"}} {value}",
                label(&job.id),
                label(&job.kind),
                label(&job.status)
            );
        }
    }
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(
        out,
        "# HELP rqcow2_{name} {help}\n# TYPE rqcow2_{name} {kind}"
    );
}

/// A label's value.
fn label(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let names: Vec<_> = (0..5).map(class_name).collect();
        assert_eq!(names, ["0", "1", "2-3", "4-7", "8-15"]);
    }

    #[test]
    fn labels() {
        assert_eq!(label("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
