//! Names of backing files, and which of them may be followed.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{End, Layer};

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

/// The path as QEMU's programs take it: what is before a colon would be a
/// protocol.
pub fn for_qemu(path: &str) -> String {
    match Name::parse(path) {
        Name::Path(whole) if whole == path => path.to_owned(),
        _ => format!("./{path}"),
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

/// The name by which `overlay` is to record `below`: relative where its links
/// are and where that leads to the same file whichever way the overlay is
/// reached.
pub fn link(overlay: &Layer, below: &Layer) -> String {
    let recorded = overlay
        .qcow2()
        .and_then(|image| image.backing_file.as_deref());
    let relative = recorded.is_some_and(
        |name| matches!(Name::parse(name), Name::Path(path) if Path::new(path).is_relative()),
    );
    let name = || {
        let homes = [&overlay.path, &overlay.real].map(|path| parent(path).canonicalize());
        let place = parent(&below.path).canonicalize().ok()?;
        let name = between(
            homes[0].as_ref().ok()?,
            &place.join(below.path.file_name()?),
        );
        let leads = |home: &PathBuf| home.join(&name).canonicalize().ok();
        let mut found = homes.iter().map(|home| leads(home.as_ref().ok()?));
        found
            .all(|file| file.as_ref() == Some(&below.real))
            .then(|| for_qemu(&name.display().to_string()))
    };
    let found = relative.then(name).flatten();
    found.unwrap_or_else(|| below.real.display().to_string())
}

/// The path from a directory to a file, both of them absolute and free of links
/// and `..`.
fn between(dir: &Path, file: &Path) -> PathBuf {
    let shared = (dir.components())
        .zip(file.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = dir.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(file.components().skip(shared)).collect()
}

/// A path without `.` and `..`.
fn lexical(path: &Path) -> PathBuf {
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
    fn names_that_are_given_to_qemu() {
        for name in ["a.qcow2", "/x/a:b", "./a:b", "../a"] {
            assert_eq!(for_qemu(name), name);
        }
        for name in ["a:b", "file:x", "json:{}", ":"] {
            assert_eq!(for_qemu(name), format!("./{name}"));
        }
        for (dir, file, name) in [
            ("/a", "/a/x", "x"),
            ("/a", "/a/b/x", "b/x"),
            ("/a/b", "/a/x", "../x"),
            ("/a/b/c", "/a/d/x", "../../d/x"),
            ("/", "/x", "x"),
        ] {
            let found = between(Path::new(dir), Path::new(file));
            assert_eq!(found, Path::new(name));
        }
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
