//! What a running program tells about its chains.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::Qmp;

/// The driver whose statistics these are.
const DRIVER: &str = "rqcow2";

/// Everything at one moment. Keys are added, never changed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sample {
    /// The chains that the driver serves, by the node on top.
    pub chains: Vec<ChainSample>,
    /// Jobs that go on.
    pub jobs: Vec<Job>,
}

/// One chain.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ChainSample {
    /// Name of the node on top.
    pub node: String,
    /// Requests that the node on top got.
    pub requests: Requests,
    /// What the driver counts.
    pub driver: DriverStats,
}

/// What every node counts.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Requests {
    /// Reads.
    #[serde(rename(deserialize = "rd_operations"))]
    pub reads: u64,
    /// Bytes read.
    #[serde(rename(deserialize = "rd_bytes"))]
    pub read_bytes: u64,
    /// Writes.
    #[serde(rename(deserialize = "wr_operations"))]
    pub writes: u64,
    /// Bytes written.
    #[serde(rename(deserialize = "wr_bytes"))]
    pub written_bytes: u64,
}

/// `BlockStatsSpecificRqcow2` of QMP.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all(deserialize = "kebab-case"))]
pub struct DriverStats {
    /// Images in the chain.
    pub layers: u64,
    /// Memory of the index.
    pub index_bytes: u64,
    /// Memory of index and caches.
    pub cache_bytes: u64,
    /// What that may be.
    pub cache_limit: u64,
    /// Extents that were found in memory.
    pub hits: u64,
    /// Extents for which tables were read.
    pub misses: u64,
    /// Parts of the index that were filled.
    pub merged_slices: u64,
    /// Parts of tables that were read.
    pub table_reads: u64,
    /// Extents that are zero.
    pub zero_reads: u64,
    /// Extents that no image has.
    pub below_reads: u64,
    /// Extents by depth: 0, 1, 2 to 3, 4 to 7, ...
    pub reads_by_depth: Vec<u64>,
}

/// A job.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, rename_all(deserialize = "kebab-case"))]
pub struct Job {
    /// Its name.
    pub id: String,
    /// What it does.
    #[serde(rename(deserialize = "type"))]
    pub kind: String,
    /// Its state.
    pub status: String,
    /// How far it is.
    pub current_progress: u64,
    /// How far it has to go.
    pub total_progress: u64,
}

impl Sample {
    /// Asks. Only flat answers are asked for: nested ones take seconds at a
    /// depth of hundreds.
    pub fn take(qmp: &mut Qmp) -> Result<Self> {
        let nodes = qmp.command("query-blockstats", json!({"query-nodes": true}))?;
        let mut chains: Vec<_> = items(&nodes).filter_map(chain).collect();
        let names: HashSet<_> = chains.iter().map(|chain| chain.node.clone()).collect();
        let inner = qmp
            .command("x-debug-query-block-graph", Value::Null)
            .map(|graph| backing_nodes(&graph, &names))
            .unwrap_or_default();
        chains.retain(|chain| !inner.contains(&chain.node));
        chains.sort_by(|a, b| a.node.cmp(&b.node));
        let jobs = qmp.command("query-jobs", Value::Null)?;
        let jobs = items(&jobs).filter_map(|job| Job::deserialize(job).ok());
        Ok(Self {
            chains,
            jobs: jobs.collect(),
        })
    }
}

/// What is in a list; nothing if it is none.
pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn chain(node: &Value) -> Option<ChainSample> {
    let driver = &node["driver-specific"];
    if driver["driver"] != DRIVER {
        return None;
    }
    Some(ChainSample {
        node: node["node-name"].as_str()?.to_owned(),
        requests: Requests::deserialize(&node["stats"]).ok()?,
        driver: DriverStats::deserialize(driver).ok()?,
    })
}

/// Nodes of the driver that are the backing file of another one.
fn backing_nodes(graph: &Value, names: &HashSet<String>) -> HashSet<String> {
    let name = |node: &Value| Some((node["id"].as_u64()?, node["name"].as_str()?.to_owned()));
    let by_id: HashMap<_, _> = items(&graph["nodes"])
        .filter_map(name)
        .filter(|(_, name)| names.contains(name))
        .collect();
    let below = |edge: &Value| {
        by_id.get(&edge["parent"].as_u64()?)?;
        let child = by_id.get(&edge["child"].as_u64()?)?;
        (edge["name"] == "backing").then(|| child.clone())
    };
    items(&graph["edges"]).filter_map(below).collect()
}
