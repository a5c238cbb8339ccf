//! By which nodes a running program has the layers open.
//!
//! Names of files are found again by QEMU only where it was given them in the
//! same way. Nodes are unambiguous, and names that images record can stay
//! relative when they are said beside them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::chain::{Chain, Layer};
use crate::live::{Qmp, items};

/// Nodes that a walk follows in one direction at most: filters above the top
/// or between two layers.
const MAX_FILTERS: usize = 1000;

/// The nodes of a chain.
pub struct Nodes {
    /// The one that has no other node above it: the topmost layer's, or that of
    /// a filter.
    pub root: String,
    /// Those of the layers, by depth.
    layers: Vec<String>,
}

impl Nodes {
    /// Asks the program that listens on `socket`. Where several nodes have the
    /// topmost image open, `chosen` says which one is meant.
    ///
    /// # Errors
    ///
    /// If the program does not have this chain open as it is on disk.
    pub fn ask(socket: &Path, quiet: bool, chain: &Chain, chosen: Option<&str>) -> Result<Self> {
        let mut qmp = Qmp::connect(socket, quiet)?;
        let home = qmp
            .peer()
            .map(|pid| PathBuf::from(format!("/proc/{pid}/cwd")));
        let listed = qmp.command("query-named-block-nodes", json!({"flat": true}))?;
        let links = qmp.command("x-debug-query-block-graph", Value::Null)?;
        Graph::new(&listed, &links, home).chain(chain, chosen)
    }

    /// The node of the layer at that depth.
    pub fn layer(&self, depth: usize) -> &str {
        &self.layers[depth]
    }
}

/// What the program tells of its nodes.
struct Graph {
    nodes: HashMap<u64, Node>,
    home: Option<PathBuf>,
}

#[derive(Default)]
struct Node {
    name: String,
    driver: String,
    file: String,
    /// Links to the nodes below, by name.
    children: Vec<(String, u64)>,
    /// Nodes above that are no jobs or devices.
    parents: Vec<u64>,
}

impl Graph {
    fn new(listed: &Value, links: &Value, home: Option<PathBuf>) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut facts: HashMap<String, (String, String)> = items(listed)
            .map(|node| {
                let told = (text(&node["drv"]), text(&node["file"]));
                (text(&node["node-name"]), told)
            })
            .collect();
        let mut nodes = HashMap::new();
        for node in items(&links["nodes"]) {
            let name = text(&node["name"]);
            // Jobs and devices are told as well.
            let known = (node["type"] == "block-driver").then(|| facts.remove(&name));
            if let (Some(Some((driver, file))), Some(id)) = (known, node["id"].as_u64()) {
                let node = Node {
                    name,
                    driver,
                    file,
                    ..Node::default()
                };
                nodes.insert(id, node);
            }
        }
        for edge in items(&links["edges"]) {
            let ends = (edge["parent"].as_u64(), edge["child"].as_u64());
            let (Some(parent), Some(child)) = ends else {
                continue;
            };
            if nodes.contains_key(&parent) && nodes.contains_key(&child) {
                if let Some(node) = nodes.get_mut(&parent) {
                    node.children.push((text(&edge["name"]), child));
                }
                if let Some(node) = nodes.get_mut(&child) {
                    node.parents.push(parent);
                }
            }
        }
        Self { nodes, home }
    }

    fn chain(&self, chain: &Chain, chosen: Option<&str>) -> Result<Nodes> {
        let top = &chain.layers[0];
        let mut found: Vec<u64> = (self.nodes.keys().copied())
            .filter(|id| self.serves(*id, top))
            .collect();
        if let Some(name) = chosen {
            found.retain(|id| {
                self.nodes[id].name == name
                    || self.root(*id).is_ok_and(|r| self.nodes[&r].name == name)
            });
        }
        let id = match found[..] {
            [id] => id,
            [] => bail!(
                "no node{} has {} open{}",
                chosen.map_or(String::new(), |name| format!(" {name}, or below it,")),
                top.real.display(),
                self.unseen()
            ),
            _ => bail!(
                "several nodes have {} open: say by --device which one: {}",
                top.real.display(),
                self.names(&found)
            ),
        };
        let mut layers = vec![self.nodes[&id].name.clone()];
        let mut above = id;
        for (depth, layer) in chain.layers.iter().enumerate().skip(1) {
            let name = &self.nodes[&above].name;
            let below = (self.child(above, "backing"))
                .and_then(|id| self.below_filters(id, layer))
                .with_context(|| {
                    format!(
                        "below node {name} the image at depth {depth}, {}, is not what is open \
                         there: the chain in use is another one than that on disk",
                        layer.real.display()
                    )
                })?;
            layers.push(self.nodes[&below].name.clone());
            above = below;
        }
        let root = self.nodes[&self.root(id)?].name.clone();
        Ok(Nodes { root, layers })
    }

    /// The node itself, or that below its filters, if it is the layer's.
    fn below_filters(&self, mut id: u64, layer: &Layer) -> Option<u64> {
        for _ in 0..MAX_FILTERS {
            if self.serves(id, layer) {
                return Some(id);
            }
            // A filter has one of these; an image would have both.
            id = self
                .child(id, "file")
                .xor(self.child(id, "backing"))
                .filter(|below| !self.nodes[below].children.is_empty())?;
        }
        None
    }

    /// The node above which there is none.
    fn root(&self, mut id: u64) -> Result<u64> {
        for _ in 0..MAX_FILTERS {
            id = match self.nodes[&id].parents[..] {
                [] => return Ok(id),
                [above] => above,
                _ => bail!(
                    "node {} has several nodes above it: {}",
                    self.nodes[&id].name,
                    self.names(&self.nodes[&id].parents)
                ),
            };
        }
        bail!("too many nodes above {}", self.nodes[&id].name)
    }

    /// Whether it is this layer's node: one of its format, with its file.
    fn serves(&self, id: u64, layer: &Layer) -> bool {
        let driver = &self.nodes[&id].driver;
        let format = layer.format();
        if driver != format && !(format == "qcow2" && driver == "rqcow2") {
            return false;
        }
        let below = |id: u64| self.child(id, "file");
        // What stands between an image and its file has a file itself.
        let mut file = below(id);
        for _ in 0..MAX_FILTERS {
            match file.and_then(below) {
                Some(next) => file = Some(next),
                None => break,
            }
        }
        file.and_then(|id| self.identity(&self.nodes[&id].file)) == Some(layer.file.id)
    }

    fn child(&self, id: u64, name: &str) -> Option<u64> {
        let mut children = self.nodes[&id].children.iter();
        children.find(|(link, _)| link == name).map(|(_, id)| *id)
    }

    /// Device and inode of what the program knows by that name.
    fn identity(&self, file: &str) -> Option<(u64, u64)> {
        let path = match &self.home {
            Some(home) => home.join(file),
            None => PathBuf::from(file),
        };
        let data = fs::metadata(path).ok()?;
        Some((data.dev(), data.ino()))
    }

    /// Why a node may not have been found.
    fn unseen(&self) -> String {
        let files = self.nodes.values().filter(|node| node.children.is_empty());
        let mut unseen: Vec<_> = files
            .filter(|node| self.identity(&node.file).is_none())
            .map(|node| node.file.as_str())
            .collect();
        unseen.sort_unstable();
        match unseen.first() {
            Some(file) => format!(
                "; {} files it has open are not found from here, {file} for one",
                unseen.len()
            ),
            None => String::new(),
        }
    }

    fn names(&self, ids: &[u64]) -> String {
        let mut names: Vec<_> = ids.iter().map(|id| self.nodes[id].name.as_str()).collect();
        names.sort_unstable();
        names.join(", ")
    }
}
