//! What the last lines of a process that ended say about the cause, where they say it in words that every program
//! gets from the system. Anything else is for a person to read.

use super::Code;

/// What is wrong, as far as the output shows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Telling {
    pub code: Code,
    /// Continues "it exited with code 1: ".
    pub what: String,
    pub fix: String,
}

/// The latest line that tells something.
pub fn telling(lines: &[String]) -> Option<Telling> {
    lines.iter().rev().find_map(|line| init(line).or_else(|| loader(line)).or_else(|| errno(line)))
}

/// The container's init process, when it cannot start the command: `[FATAL tini (7)] exec /app failed: …`.
fn init(line: &str) -> Option<Telling> {
    let (_, rest) = line.strip_prefix("[FATAL tini (")?.split_once("exec ")?;
    let (command, reason) = rest.split_once(" failed: ")?;
    let (code, what, fix) = match reason {
        // That the file itself is there was seen before the start. What has no known form is tried as a script, so that
        // it is the shell which is missing then.
        "No such file or directory" | "Exec format error" => (
            Code::ExecFailed,
            format!(
                "`{command}` is in the image and cannot be started: its interpreter or loader is missing, or it is no \
                 program for this machine"
            ),
            "a script needs what its first line names, a dynamic binary its C library, in the image; a binary must be \
             built for the node's architecture",
        ),
        "Permission denied" => (
            Code::NoSuchCommand,
            format!("`{command}` may not be executed"),
            "make it executable in the image: chmod +x",
        ),
        other => (Code::NoSuchCommand, format!("`{command}` cannot be run: {other}"), "correct `command`"),
    };
    Some(Telling { code, what, fix: fix.to_owned() })
}

/// `app: error while loading shared libraries: libx.so.1: cannot open shared object file: …`, or musl's
/// `Error loading shared library libx.so.1: No such file or directory (needed by /app)`.
fn loader(line: &str) -> Option<Telling> {
    let (_, rest) = line
        .split_once("error while loading shared libraries: ")
        .or_else(|| line.split_once("Error loading shared library "))?;
    let library = rest.split(':').next()?;
    Some(Telling {
        code: Code::MissingLibrary,
        what: format!("it needs the library {library}, which is not in the image"),
        fix: format!("install the package that has {library} in the image"),
    })
}

/// Errors of system calls, by the C library's words and by the names that runtimes print.
fn errno(line: &str) -> Option<Telling> {
    const KNOWN: [(&[&str], Code, &str, &str); 4] = [
        (
            &["address already in use", "eaddrinuse"],
            Code::PortTaken,
            "the port it wants to listen on is taken",
            "let it listen on another port, or stop what has this one",
        ),
        (
            &["read-only file system", "erofs"],
            Code::ReadOnly,
            "it writes to a file system that is read-only",
            "let it write to a volume without `read_only`, or to /tmp",
        ),
        (
            &["no space left on device", "enospc"],
            Code::DiskFull,
            "a disk it writes to is full",
            "free space there; on the node `docker system df` shows what images and volumes take",
        ),
        (
            &["permission denied", "eacces"],
            Code::PermissionDenied,
            "it may not do what it tries to",
            "see in its last lines what it is; files of a volume belong to the user who made them",
        ),
    ];
    let line = line.to_lowercase();
    let (_, code, what, fix) = KNOWN.into_iter().find(|(words, ..)| words.iter().any(|words| line.contains(words)))?;
    Some(Telling { code, what: what.to_owned(), fix: fix.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, code: Code, words: &str) {
        let telling = telling(&["starting".to_owned(), line.to_owned(), "bye".to_owned()]).expect("it tells something");
        assert_eq!(telling.code, code);
        assert!(telling.what.contains(words), "{}", telling.what);
    }

    #[test]
    fn errors_that_every_program_has_are_known() {
        check("[FATAL tini (7)] exec /ls failed: No such file or directory", Code::ExecFailed, "`/ls` is in the image");
        check("[FATAL tini (7)] exec /app failed: Exec format error", Code::ExecFailed, "`/app` is in the image");
        let glibc =
            "/x: error while loading shared libraries: libpq.so.5: cannot open shared object file: No such file";
        check(glibc, Code::MissingLibrary, "libpq.so.5");
        let musl = "Error loading shared library libz.so.1: No such file or directory (needed by /app)";
        check(musl, Code::MissingLibrary, "libz.so.1,");
        check("Error: listen EADDRINUSE: address already in use :::80", Code::PortTaken, "port");
        check("cannot open /data/x: Read-only file system (os error 30)", Code::ReadOnly, "read-only");
        check("write: No space left on device", Code::DiskFull, "full");
    }

    #[test]
    fn the_latest_line_counts_and_most_say_nothing() {
        let lines = ["Permission denied", "EROFS: read-only file system, open '/x'", "at main (index.js:3)"];
        assert_eq!(telling(&lines.map(str::to_owned)).expect("it tells something").code, Code::ReadOnly);
        assert_eq!(telling(&["fatal: no DATABASE_URL".to_owned()]), None);
        assert_eq!(telling(&[]), None);
    }
}
