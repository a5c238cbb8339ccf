//! Names of backing files, and which of them may be followed.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::End;

/// What may be opened because an image names it.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Directories in which layers may be, free of links. The directory of the
    /// top is one of them always.
    pub allow: Vec<PathBuf>,
    /// The longest chain that is followed.
    pub max_layers: usize,
}

impl Policy {
    /// The same with the directory of the top allowed.
    pub(super) fn with_home(&self, top: &Path, real: &Path) -> Self {
        let mut policy = self.clone();
        let homes = [parent(top).canonicalize().ok(), Some(parent(real).into())];
        policy.allow.extend(homes.into_iter().flatten());
        policy
    }

    fn allows(&self, path: &Path) -> bool {
        self.allow.iter().any(|dir| path.starts_with(dir))
    }
}

/// How QEMU understands a file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name<'a> {
    /// `json:` and a description of what to open.
    Json,
    /// A protocol's name and a colon.
    Protocol(&'a str),
    /// A path.
    Path(&'a str),
}

impl<'a> Name<'a> {
    /// Tells them apart as QEMU does.
    pub fn parse(name: &'a str) -> Self {
        if name.starts_with("json:") {
            return Self::Json;
        }
        match name.find([':', '/']) {
            Some(at) if name.as_bytes()[at] == b':' => match &name[..at] {
                "file" => Self::Path(&name[at + 1..]),
                protocol => Self::Protocol(protocol),
            },
            _ => Self::Path(name),
        }
    }
}

/// Why a link was not followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A `json:` name.
    Json,
    /// A name with this protocol.
    Protocol(String),
    /// A path outside of the directories allowed.
    Outside(PathBuf),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json => f.write_str("a json: name is never followed"),
            Self::Protocol(name) => write!(f, "the protocol {name}: is never followed"),
            Self::Outside(path) => write!(
                f,
                "{} is outside of the directories allowed (--allow DIR)",
                path.display()
            ),
        }
    }
}

/// The directory a path is in.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

/// The path that `name` in the image at `overlay` leads to, as it is named and
/// free of links.
pub(super) fn resolve(
    name: &str,
    overlay: &Path,
    policy: &Policy,
) -> Result<(PathBuf, PathBuf), End> {
    let name = match Name::parse(name) {
        Name::Json => return Err(End::Refused(Refusal::Json)),
        Name::Protocol(which) => return Err(End::Refused(Refusal::Protocol(which.to_owned()))),
        Name::Path(path) => Path::new(path),
    };
    let unreadable = |path: &Path, error: &io::Error| match error.kind() {
        io::ErrorKind::NotFound => End::Missing(path.to_owned()),
        _ => End::Unreadable(path.to_owned(), error.to_string()),
    };
    // The directory is the one that the overlay was named with. Free of links
    // it stays short however many layers there are.
    let dir = parent(overlay);
    let dir = dir.canonicalize().map_err(|e| unreadable(dir, &e))?;
    let path = dir.join(name);
    // Whether a file outside exists is nobody's business either.
    let lexical = lexical(&path);
    if !policy.allows(&lexical) {
        let outside = parent(&lexical).canonicalize().ok();
        if !outside.is_some_and(|dir| policy.allows(&dir)) {
            return Err(End::Refused(Refusal::Outside(lexical)));
        }
    }
    let real = path.canonicalize().map_err(|e| unreadable(&path, &e))?;
    if !policy.allows(&real) {
        return Err(End::Refused(Refusal::Outside(real)));
    }
    Ok((path, real))
}

/// A path without `.` and `..`.
fn lexical(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                result.pop();
            }
            other => result.push(other),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_as_qemu_does() {
        assert_eq!(Name::parse("a.qcow2"), Name::Path("a.qcow2"));
        assert_eq!(Name::parse("/x/a:b"), Name::Path("/x/a:b"));
        assert_eq!(Name::parse("./a:b"), Name::Path("./a:b"));
        assert_eq!(Name::parse("file:/x"), Name::Path("/x"));
        assert_eq!(Name::parse("nbd://host"), Name::Protocol("nbd"));
        assert_eq!(Name::parse("json:{}"), Name::Json);
        assert_eq!(Name::parse(":x"), Name::Protocol(""));
    }

    #[test]
    fn only_what_is_allowed_is_followed() {
        let home = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let (home, other) = (
            home.path().canonicalize().unwrap(),
            other.path().canonicalize().unwrap(),
        );
        let top = home.join("top");
        for path in [&top, &home.join("base"), &other.join("base")] {
            std::fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink(other.join("base"), home.join("link")).unwrap();
        let none = Policy {
            allow: Vec::new(),
            max_layers: 9,
        };
        let policy = none.with_home(&top, &top);
        let outside = |name: &str, policy: &Policy| {
            matches!(
                resolve(name, &top, policy),
                Err(End::Refused(Refusal::Outside(_)))
            )
        };
        assert_eq!(resolve("base", &top, &policy).unwrap().1, home.join("base"));
        assert!(outside("link", &policy));
        assert!(outside("/etc/passwd", &policy));
        assert!(outside("../../etc/passwd", &policy));
        assert!(outside(other.join("base").to_str().unwrap(), &policy));
        assert!(outside(other.join("none").to_str().unwrap(), &policy));
        assert!(matches!(
            resolve("none", &top, &policy),
            Err(End::Missing(_))
        ));
        let wider = Policy {
            allow: vec![other.clone()],
            ..none
        }
        .with_home(&top, &top);
        assert_eq!(resolve("link", &top, &wider).unwrap().1, other.join("base"));
    }
}
