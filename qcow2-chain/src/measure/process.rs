//! QEMU's programs as child processes that cannot outlive us, hang us, or
//! flood us.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 16 << 20;

/// A program ended where it should not have: by a signal, or with an error.
#[derive(Debug)]
pub struct Crash(pub String);

impl std::fmt::Display for Crash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Crash {}

/// A program, and what is said to it and by it.
pub struct Program {
    child: Child,
    name: String,
    patience: Duration,
}

impl Program {
    /// Starts a program.
    pub fn start(path: &Path, args: &[String], patience: Duration) -> Result<Self> {
        let child = Command::new(path)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", path.display()))?;
        Ok(Self {
            child,
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            patience,
        })
    }

    /// Says something.
    pub fn say(&mut self, text: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("no input")?;
        // Why it does not listen any more is told when no answer comes.
        let _ = input.write_all(text.as_bytes());
        Ok(())
    }

    /// Waits until what was said ends in `end`.
    pub fn hear(&mut self, end: &[u8]) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        let mut answer = Vec::new();
        let mut piece = [0; 65536];
        while !answer.ends_with(end) {
            let output = self.child.stdout.as_mut().context("no output")?;
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&*output, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => bail!(
                    "{}: no answer in {} s",
                    self.name,
                    self.patience.as_secs_f64()
                ),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let got = output.read(&mut piece)?;
            if got == 0 {
                return Err(self.ended().into());
            }
            answer.extend_from_slice(&piece[..got]);
            ensure!(answer.len() <= MAX_ANSWER, "{}: too much output", self.name);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Waits until the program ends by itself; what it has said.
    pub fn finish(&mut self) -> Result<String> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + self.patience;
        let mut answer = Vec::new();
        let mut output = self.child.stdout.take().context("no output")?;
        // It may close its output and stay, so that this is looked at as well.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "{}: not done in {} s",
                self.name,
                self.patience.as_secs_f64()
            );
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&output, PollFlags::IN)];
            if !matches!(poll(&mut fds, Some(&left)), Ok(1..)) {
                continue;
            }
            let mut piece = [0; 65536];
            let got = output.read(&mut piece)?;
            if got == 0 {
                break;
            }
            answer.extend_from_slice(&piece[..got]);
            ensure!(answer.len() <= MAX_ANSWER, "{}: too much output", self.name);
        }
        let status = self.child.wait()?;
        if !status.success() {
            return Err(self.ended().into());
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// How it ended.
    fn ended(&mut self) -> Crash {
        let status = self.child.wait();
        let how = match status.as_ref().map(|s| (s.signal(), s.code())) {
            Ok((Some(11), _)) => "SIGSEGV".into(),
            Ok((Some(6), _)) => "SIGABRT".into(),
            Ok((Some(signal), _)) => format!("signal {signal}"),
            Ok((_, Some(code))) => format!("exit status {code}"),
            _ => "unknown end".into(),
        };
        Crash(format!("{}: {how}", self.name))
    }

    /// Bytes of memory that it has resident.
    pub fn resident(&self) -> Result<u64> {
        let path = PathBuf::from(format!("/proc/{}/status", self.child.id()));
        let text = std::fs::read_to_string(path)?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok())
            .context("no VmRSS")?;
        Ok(kib << 10)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
