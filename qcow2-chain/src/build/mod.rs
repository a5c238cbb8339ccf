//! `build`: chains to measure and to test with, the same one for the same
//! arguments.

mod content;
mod expected;
mod place;
mod places;
pub mod writer;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rust_qcow2::format::header::CompressionType;
use rust_qcow2::format::refcount::RefcountOrder;
use rust_qcow2::image::create::cluster_bits;
use serde::Serialize;

use crate::Usage;
use crate::cleanup::Unfinished;
use crate::cli::{Build, Codec, Output};
use crate::text::{self, Progress, bytes};
use content::Content;
use expected::Expected;
use place::Place;
use places::Places;
use writer::{Format, What};

/// A layer that is to be written.
struct Job {
    layer: usize,
    path: PathBuf,
    format: Format,
    raw: bool,
    clusters: Vec<(u64, What)>,
}

/// The whole answer. Keys are added, never changed.
#[derive(Serialize)]
pub struct Report {
    /// The image on top.
    pub top: String,
    layers: usize,
    disk_size: u64,
    file_bytes: u64,
    /// The raw file with the expected content.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected: Option<String>,
    seconds: f64,
}

/// Carries the command out.
pub fn run(args: &Build) -> Result<()> {
    let report = make(args)?;
    match args.output {
        Output::Json => text::print_json(&report),
        Output::Table => {
            text::print(&format!("{}\n", text::printable(&report.top)))?;
            text::note(&format!(
                "{} layers, {} in {:.1} s",
                report.layers,
                bytes(report.file_bytes),
                report.seconds
            ));
            Ok(())
        }
    }
}

/// Makes the chain.
pub fn make(args: &Build) -> Result<Report> {
    let begin = Instant::now();
    let plan = Plan::new(args).map_err(|error| Usage(format!("{error:#}")))?;
    // What cannot be done is found before anything is removed or made.
    let mut places = Places::new(args, &|layer| plan.size(layer))?;
    let place = Place::take(args)?;
    let unit = plan.units().min().unwrap_or(65536);
    let mut expected = args.expected.as_ref().map(|_| Expected::new(unit));
    let content = Content::new(args.seed);
    let bar = Progress::new("writing layers", args.layers, args.quiet);
    let (done, written) = (AtomicUsize::new(0), Mutex::new(Ok(0)));

    let (send, receive) = mpsc::sync_channel::<Job>(4);
    let receive = Mutex::new(receive);
    std::thread::scope(|scope| {
        // Goes away when all is planned, which ends the workers.
        let send = send;
        let workers = std::thread::available_parallelism()
            .map_or(2, usize::from)
            .min(8);
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    // Only fetching is done under the lock.
                    let job = receive.lock().ok().and_then(|queue| queue.recv().ok());
                    let Some(job) = job else { break };
                    let result = carry_out(&job, &content, &place.made);
                    bar.at(done.fetch_add(1, Ordering::Relaxed) + 1);
                    if let Ok(mut written) = written.lock() {
                        match (&mut *written, result) {
                            (Ok(all), Ok(len)) => *all += len,
                            (Ok(_), Err(error)) => *written = Err(error),
                            (Err(_), _) => {}
                        }
                    }
                }
            });
        }
        plan.layers(&mut places, &mut expected, &mut |job| {
            let failed = written.lock().is_ok_and(|written| written.is_err());
            !failed && send.send(job).is_ok()
        })
    })?;
    drop(bar);
    let file_bytes = written
        .into_inner()
        .unwrap_or_else(|_| bail!("a thread has ended"))?;
    if let (Some(to), Some(expected)) = (&place.expected, &expected) {
        expected
            .write(&to.file, &content, &|layer| plan.size(layer), args)
            .with_context(|| format!("cannot write {}", to.path.display()))?;
    }
    place.made.keep();
    Ok(Report {
        top: plan.path(args.layers - 1).display().to_string(),
        layers: args.layers,
        disk_size: plan.size(args.layers - 1),
        file_bytes,
        expected: args
            .expected
            .as_ref()
            .map(|path| path.display().to_string()),
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// What the arguments amount to.
struct Plan<'a> {
    args: &'a Build,
    cluster_bits: Vec<u32>,
    refcount_order: RefcountOrder,
}

impl<'a> Plan<'a> {
    fn new(args: &'a Build) -> Result<Self> {
        ensure!(
            args.disk > 0 && args.disk % 512 == 0 && args.grow % 512 == 0,
            "--disk and --grow: multiples of 512"
        );
        let bits = args
            .cluster_size
            .iter()
            .map(|size| Ok(cluster_bits(*size, false)?));
        let bits: Vec<u32> = bits.collect::<Result<_>>().context("--cluster-size")?;
        let v2 = args.compat == 2;
        ensure!(
            !(v2 && (args.zeroes > 0.0 || args.extended_l2 || args.refcount_bits != 16)),
            "--compat 2 has neither zero clusters nor subclusters, and refcounts of 16 bits"
        );
        ensure!(
            !(v2 && args.compression == Codec::Zstd),
            "--compat 2 knows only zlib"
        );
        ensure!(
            !args.extended_l2 || bits.iter().all(|bits| *bits >= 14),
            "--extended-l2 needs clusters of 16 KiB or more"
        );
        ensure!(
            args.subclusters == 0.0 || args.extended_l2,
            "--subclusters needs --extended-l2"
        );
        let refcount_order =
            RefcountOrder::new(args.refcount_bits.ilog2()).context("--refcount-bits")?;
        Ok(Self {
            args,
            cluster_bits: bits,
            refcount_order,
        })
    }

    /// The units of mapping of all layers.
    fn units(&self) -> impl Iterator<Item = u64> + '_ {
        let shift = if self.args.extended_l2 { 5 } else { 0 };
        self.cluster_bits
            .iter()
            .map(move |bits| 1 << (bits - shift))
    }

    fn bits(&self, layer: usize) -> u32 {
        self.cluster_bits[layer % self.cluster_bits.len()]
    }

    fn size(&self, layer: usize) -> u64 {
        self.args.disk + layer as u64 * self.args.grow
    }

    fn name(&self, layer: usize) -> String {
        if layer == 0 && self.args.raw_base {
            "l0.raw".into()
        } else {
            format!("l{layer}.qcow2")
        }
    }

    fn path(&self, layer: usize) -> PathBuf {
        self.args.dir.join(self.name(layer))
    }

    /// Draws all layers from the base up. `send` returns `false` to stop.
    fn layers(
        &self,
        places: &mut Places,
        expected: &mut Option<Expected>,
        send: &mut dyn FnMut(Job) -> bool,
    ) -> Result<()> {
        let args = self.args;
        let mut random = ChaCha8Rng::seed_from_u64(args.seed ^ 0xD1B5_4A32_D192_ED03);
        let dir = args.dir.canonicalize()?;
        for layer in 0..args.layers {
            let (disk, bits) = (self.size(layer), self.bits(layer));
            let amount = match (layer, &args.base_data) {
                (0, Some(size)) => (*size).min(disk),
                _ => args.data_per_layer,
            };
            let raw = layer == 0 && args.raw_base;
            let drawn = places.draw(disk, 1 << bits, args.run, amount);
            let mut clusters: Vec<_> = drawn
                .data
                .into_iter()
                .map(|number| (number, self.what(layer, &mut random)))
                .chain(drawn.zeroes.into_iter().map(|number| (number, What::Zero)))
                .collect();
            clusters.sort_unstable_by_key(|(number, _)| *number);
            if args.compat == 2 || raw {
                clusters.retain(|(_, what)| *what != What::Zero);
            }
            if let Some(expected) = expected {
                expected.layer(layer, bits, &clusters);
            }
            let below = layer.checked_sub(1).map(|below| {
                let format = if below == 0 && args.raw_base {
                    "raw"
                } else {
                    "qcow2"
                };
                let name = self.name(below);
                let name = if args.absolute {
                    dir.join(name).display().to_string()
                } else {
                    name
                };
                (name, format.to_owned())
            });
            let job = Job {
                layer,
                path: self.path(layer),
                format: Format {
                    size: disk,
                    version: args.compat,
                    cluster_bits: bits,
                    refcount_order: self.refcount_order,
                    extended_l2: args.extended_l2,
                    compression: match args.compression {
                        Codec::Zlib => CompressionType::Zlib,
                        Codec::Zstd => CompressionType::Zstd,
                    },
                    backing: below,
                    scatter: args.scatter.then_some(args.seed ^ layer as u64),
                },
                raw,
                clusters,
            };
            if !send(job) {
                break;
            }
        }
        Ok(())
    }

    fn what(&self, layer: usize, random: &mut ChaCha8Rng) -> What {
        let (args, draw) = (self.args, random.random::<f64>());
        if layer == 0 && args.raw_base {
            What::Data
        } else if draw < args.zeroes {
            What::Zero
        } else if draw < args.zeroes + args.compressed {
            What::Compressed
        } else if args.extended_l2 && random.random_bool(args.subclusters) {
            let zero = if args.zeroes > 0.0 {
                random.random::<u32>()
            } else {
                0
            };
            let data = random.random::<u32>() | (1 << random.random_range(0..32));
            What::Parts {
                data,
                zero: zero & !data,
            }
        } else {
            What::Data
        }
    }
}

fn carry_out(job: &Job, content: &Content, made: &Unfinished) -> Result<u64> {
    let name = job.path.display();
    let file = made.file(&job.path).with_context(|| {
        format!("cannot make {name}; if somebody else writes there, name another directory")
    })?;

    let fill = |number: u64, compressible: bool, bytes: &mut [u8]| {
        content.fill(job.layer, number, compressible, bytes);
    };
    let write = if job.raw { raw } else { writer::write_to };
    write(&file, &job.format, &job.clusters, &fill).with_context(|| name.to_string())
}

fn raw(
    file: &File,
    format: &Format,
    clusters: &[(u64, What)],
    fill: &dyn Fn(u64, bool, &mut [u8]),
) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    file.set_len(format.size)?;
    let mut bytes = vec![0; 1 << format.cluster_bits];
    for (number, _) in clusters {
        fill(*number, false, &mut bytes);
        let at = number << format.cluster_bits;
        let len = (format.size - at).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..len], at)?;
    }
    Ok(format.size)
}
