//! QEMU's programs as child processes that cannot outlive us, hang us, or
//! flood us.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::cleanup;

/// Bytes of an answer at most.
const MAX_ANSWER: usize = 16 << 20;

/// Bytes that are kept of what a program complains of, the last ones.
const MAX_COMPLAINT: usize = 4096;

/// A program was ended by a signal.
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
    errors: ChildStderr,
    complaint: Vec<u8>,
    name: String,
    patience: Duration,
}

impl Program {
    /// Starts a program.
    pub fn start(path: &Path, args: &[String], patience: Duration) -> Result<Self> {
        let mut command = Command::new(path);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Or it could be one of which nobody knows when a signal ends us.
        let mut child = cleanup::uninterrupted(|| command.spawn())
            .with_context(|| format!("cannot start {}", path.display()))?;
        let errors = child.stderr.take().context("no error output")?;
        let flags = fcntl_getfl(&errors)?;
        fcntl_setfl(&errors, flags | OFlags::NONBLOCK)?;
        Ok(Self {
            child,
            errors,
            complaint: Vec::new(),
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
        let mut output = self.child.stdout.take().context("no output")?;
        while !answer.ends_with(end) {
            if !self.listen(&mut output, &mut answer, deadline)? {
                return Err(self.ended());
            }
        }
        self.child.stdout = Some(output);
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Waits until the program ends by itself; what it has said.
    pub fn finish(&mut self) -> Result<String> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + self.patience;
        let mut answer = Vec::new();
        let mut output = self.child.stdout.take().context("no output")?;
        while self.listen(&mut output, &mut answer, deadline)? {}
        let status = self.child.wait()?;
        if !status.success() {
            return Err(self.ended());
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Waits for a piece of output, and keeps errors from filling their pipe
    /// meanwhile, which would stop the program; `false` at the end.
    fn listen(
        &mut self,
        output: &mut ChildStdout,
        answer: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<bool> {
        let mut errors_open = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "{}: no answer in {} s",
                self.name,
                self.patience.as_secs_f64()
            );
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [
                PollFd::new(&*output, PollFlags::IN),
                PollFd::new(&self.errors, PollFlags::IN),
            ];
            let watched = if errors_open { 2 } else { 1 };
            match poll(&mut fds[..watched], Some(&left)) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [said, complained] = fds.map(|fd| !fd.revents().is_empty());
            if complained {
                errors_open = self.complaints();
            }
            if said {
                let mut piece = [0; 65536];
                let got = output.read(&mut piece)?;
                answer.extend_from_slice(&piece[..got]);
                ensure!(answer.len() <= MAX_ANSWER, "{}: too much output", self.name);
                return Ok(got > 0);
            }
        }
    }

    /// Takes what is there of the errors; `false` when no more can come.
    fn complaints(&mut self) -> bool {
        let mut piece = [0; MAX_COMPLAINT];
        loop {
            match self.errors.read(&mut piece) {
                Ok(0) => return false,
                Ok(got) => self.complaint.extend_from_slice(&piece[..got]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
            let more = self.complaint.len().saturating_sub(MAX_COMPLAINT);
            self.complaint.drain(..more);
        }
    }

    /// What it has complained of since the last time, as one line.
    pub fn complaint(&mut self) -> String {
        self.complaints();
        let text = String::from_utf8_lossy(&self.complaint).into_owned();
        self.complaint.clear();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join("; ")
    }

    /// How it ended: a crash, or an error of which it says what it is.
    fn ended(&mut self) -> anyhow::Error {
        let status = self.child.wait();
        let how = match status.as_ref().map(|s| (s.signal(), s.code())) {
            Ok((Some(11), _)) => "SIGSEGV".into(),
            Ok((Some(6), _)) => "SIGABRT".into(),
            Ok((Some(signal), _)) => format!("signal {signal}"),
            Ok((_, Some(code))) => {
                let complaint = self.complaint();
                return if complaint.is_empty() {
                    anyhow!("{}: exit status {code}", self.name)
                } else {
                    anyhow!("{complaint} (exit status {code})")
                };
            }
            _ => "unknown end".into(),
        };
        Crash(format!("{}: {how}", self.name)).into()
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
