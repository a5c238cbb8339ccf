//! The error type of the crate.

use std::borrow::Cow;
use std::fmt;

/// What an operation returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error number, as the operating system and QEMU count them, and where
/// there is more to say, a sentence for the person in front of the screen.
///
/// Errors of the request path carry no sentence and cost no allocation.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    errno: i32,
    message: Option<Cow<'static, str>>,
    append_errno: bool,
    hint: Option<Box<str>>,
}

impl Error {
    /// An error without a sentence. `errno` is positive (`libc::EIO`).
    #[must_use]
    pub const fn errno(errno: i32) -> Self {
        Self {
            errno,
            message: None,
            append_errno: false,
            hint: None,
        }
    }

    /// An error with a complete sentence.
    pub fn new(errno: i32, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            errno,
            message: Some(message.into()),
            append_errno: false,
            hint: None,
        }
    }

    /// An error whose sentence is followed by a colon and the system's text for
    /// the error number (what QEMU's `error_setg_errno()` prints).
    pub fn with_errno(errno: i32, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            errno,
            message: Some(message.into()),
            append_errno: true,
            hint: None,
        }
    }

    /// Invalid data or arguments.
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(libc::EINVAL, message)
    }

    /// Something this driver does not do.
    pub fn unsupported(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(libc::ENOTSUP, message)
    }

    /// Puts a sentence in front of an error from below, keeping its number.
    /// A sentence that is already there is kept, as it is nearer to the cause.
    #[must_use]
    pub fn context(self, message: impl Into<Cow<'static, str>>) -> Self {
        if self.message.is_some() {
            self
        } else {
            Self::with_errno(self.errno, message)
        }
    }

    /// Adds what the person may do about it, for a terminal.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<Box<str>>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What the person may do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The positive error number.
    #[must_use]
    pub const fn code(&self) -> i32 {
        self.errno
    }

    /// The sentence, if there is one, without the system's text.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// Whether the system's text for the number belongs behind the sentence.
    #[must_use]
    pub const fn appends_errno(&self) -> bool {
        self.append_errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let system = || system_text(self.errno);
        match (&self.message, self.append_errno) {
            (Some(message), false) => f.write_str(message),
            (Some(message), true) => write!(f, "{message}: {}", system()),
            (None, _) => write!(f, "{}", system()),
        }
    }
}

/// The system's text for an error number, as `strerror()` has it.
fn system_text(errno: i32) -> String {
    let mut text = std::io::Error::from_raw_os_error(errno).to_string();
    if let Some(end) = text.rfind(" (os error ") {
        text.truncate(end);
    }
    text
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({}, {self})", self.errno)
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Self {
        Self::errno(e.raw_os_error().unwrap_or(libc::EIO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        assert_eq!(Error::errno(libc::EIO).to_string(), "Input/output error");
        let error = Error::errno(libc::ENOSPC).context("Could not write");
        assert_eq!(
            error.to_string(),
            "Could not write: No space left on device"
        );
        assert_eq!(
            error.context("Further away").message(),
            Some("Could not write")
        );
        assert_eq!(Error::invalid("Bad").to_string(), "Bad");
    }
}
