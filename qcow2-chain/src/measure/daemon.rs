//! `qemu-storage-daemon`, spoken to over its standard input and output.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::process::Program;
use super::qemu::Qemu;

/// A daemon that is ready for commands.
pub struct Daemon {
    program: Program,
    /// What came and was not waited for.
    waiting: Vec<Value>,
}

impl Daemon {
    /// Starts one.
    pub fn start(qemu: &Qemu, patience: Duration) -> Result<Self> {
        let args = [
            "--chardev",
            "stdio,id=monitor",
            "--monitor",
            "chardev=monitor",
        ]
        .map(str::to_owned);
        let path = qemu.program("qemu-storage-daemon");
        let program = Program::start(&path, &args, patience)?;
        let mut daemon = Self {
            program,
            waiting: Vec::new(),
        };
        daemon.line(&|line| line.get("QMP").is_some())?;
        daemon.command("qmp_capabilities", Value::Null)?;
        Ok(daemon)
    }

    /// Carries a command out; the seconds until the answer.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<f64> {
        let mut command = json!({ "execute": name });
        if !arguments.is_null() {
            command["arguments"] = arguments;
        }
        let begin = Instant::now();
        self.program.say(&format!("{command}\n"))?;
        let answer =
            self.line(&|line| line.get("return").is_some() || line.get("error").is_some())?;
        if let Some(error) = answer.get("error") {
            bail!("{name}: {}", error["desc"].as_str().unwrap_or("failed"));
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Waits for an event.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        Ok(self.line(&|line| line["event"] == name)?["data"].take())
    }

    fn line(&mut self, is_it: &dyn Fn(&Value) -> bool) -> Result<Value> {
        loop {
            if let Some(at) = self.waiting.iter().position(is_it) {
                return Ok(self.waiting.remove(at));
            }
            let text = self.program.hear(b"\n")?;
            for line in text.lines() {
                let value = serde_json::from_str(line).context("no JSON from the daemon")?;
                self.waiting.push(value);
            }
        }
    }
}
