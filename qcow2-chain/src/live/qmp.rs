//! A connection to a QMP socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

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
    pub fn connect(path: &Path) -> Result<Self> {
        let name = path.display();
        let writer =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {name}"))?;
        writer.set_read_timeout(Some(PATIENCE))?;
        writer.set_write_timeout(Some(PATIENCE))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer };
        let greeting = qmp
            .line()
            .with_context(|| format!("no greeting on {name} (in use by somebody else?)"))?;
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
        self.writer.write_all(text.as_bytes())?;
        loop {
            let mut answer = self
                .line()
                .with_context(|| format!("no answer to {name}"))?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{name}: {}", error["desc"].as_str().unwrap_or("failed"));
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = Vec::new();
        let read = (&mut self.reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)?;
        ensure!(read > 0, "the connection was closed");
        ensure!(line.ends_with(b"\n"), "the answer has no end");
        Ok(serde_json::from_slice(&line)?)
    }
}
