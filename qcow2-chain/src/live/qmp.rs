//! A connection to a QMP socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use serde_json::{Value, json};

use crate::text;

/// How long the socket may be somebody else's, and when the user is told.
const BUSY: Duration = Duration::from_secs(10);
const TELL: Duration = Duration::from_secs(2);
/// How long until it is tried again to get into a full queue.
const AGAIN: Duration = Duration::from_millis(100);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of an answer at most.
const MAX_LINE: u64 = 256 << 20;

/// A connection that is ready for commands.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(path: &Path, quiet: bool) -> Result<Self> {
        let name = path.display();
        let mut wait = Wait::new(path, quiet);
        let writer = wait.queue(path)?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer };
        wait.greeting(&mut qmp.reader)?;
        qmp.writer.set_read_timeout(Some(PATIENCE))?;
        qmp.writer.set_write_timeout(Some(PATIENCE))?;
        let greeting = qmp
            .line()
            .with_context(|| format!("no greeting on {name}"))?;
        ensure!(greeting.get("QMP").is_some(), "{name} does not speak QMP");
        qmp.command("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Carries a command out. Events that come in between are dropped.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut command = json!({ "execute": name });
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        let text = format!("{command}\n");
        let no_answer = || format!("no answer to {name}");
        self.writer
            .write_all(text.as_bytes())
            .map_err(told)
            .with_context(no_answer)?;
        loop {
            let mut answer = self.line().with_context(no_answer)?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{name}: {}", error["desc"].as_str().unwrap_or("failed"));
            }
        }
    }

    /// The process at the other end, where the kernel tells.
    pub fn peer(&self) -> Option<u32> {
        let peer = sockopt::socket_peercred(&self.writer).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        let read = (&mut self.reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .map_err(told)?;
        ensure!(read > 0, "the connection was closed");
        ensure!(line.ends_with(b"\n"), "the answer has no end");
        Ok(serde_json::from_slice(&line)?)
    }
}

/// Waiting for a socket that may be in use: who comes second stands in a queue
/// and hears nothing, and who finds that full is turned away.
struct Wait {
    name: String,
    begin: Instant,
    quiet: bool,
}

impl Wait {
    fn new(path: &Path, quiet: bool) -> Self {
        Self {
            name: path.display().to_string(),
            begin: Instant::now(),
            quiet,
        }
    }

    /// Connects, which would wait for ever where the queue is full.
    fn queue(&mut self, path: &Path) -> Result<UnixStream> {
        let cannot = || format!("cannot connect to {}", path.display());
        let address = SocketAddrUnix::new(path).with_context(cannot)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .with_context(cannot)?;
        loop {
            match connect(&socket, &address) {
                Err(Errno::AGAIN | Errno::INTR) => self.still()?,
                result => break result.with_context(cannot)?,
            }
            std::thread::sleep(AGAIN);
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// Waits until something is said.
    fn greeting(&mut self, reader: &mut BufReader<UnixStream>) -> Result<()> {
        loop {
            reader.get_ref().set_read_timeout(Some(AGAIN))?;
            match reader.fill_buf() {
                Err(error) if is_pause(&error) => self.still()?,
                result => {
                    result.with_context(|| format!("no greeting on {}", self.name))?;
                    return Ok(());
                }
            }
        }
    }

    /// Nothing has come as yet.
    fn still(&mut self) -> Result<()> {
        let waited = self.begin.elapsed();
        ensure!(
            waited < BUSY,
            "no greeting on {} in {} s: it serves one client at a time, and is in use by somebody \
             else, or the program hangs",
            self.name,
            BUSY.as_secs()
        );
        if waited >= TELL && !self.quiet {
            self.quiet = true;
            text::note(&format!(
                "qcow2-chain: waiting for {}: a QMP socket serves one client at a time",
                text::printable(&self.name)
            ));
        }
        Ok(())
    }
}

/// What it means that a connection does not work.
fn told(error: io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => anyhow!("the connection was closed"),
        _ if is_pause(&error) => {
            anyhow!("none in {} s: the program hangs", PATIENCE.as_secs())
        }
        _ => error.into(),
    }
}

/// Nothing came in time.
fn is_pause(error: &io::Error) -> bool {
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}
