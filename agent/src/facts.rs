//! What this host is and has, from the kernel. What cannot be read is zero or empty: a report with a gap is better than
//! none.

use std::path::Path;

use orca_cluster::replica::Facts;
use orca_cluster::resource::{Cpu, Memory};

/// What the host itself knows, read now; `data` is the directory whose disk matters. A few system calls, no waiting.
pub fn host(data: &Path) -> Facts {
    let name = rustix::system::uname();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, |count| count.get());
    // A directory that is yet to be made is on the disk of the one above.
    let disk = data.ancestors().find_map(|directory| rustix::fs::statvfs(directory).ok());
    Facts {
        host_name: name.nodename().to_string_lossy().into_owned(),
        architecture: image_architecture(std::env::consts::ARCH).to_owned(),
        kernel: name.release().to_string_lossy().into_owned(),
        cpu: Cpu(u32::try_from(processors).unwrap_or(u32::MAX).saturating_mul(1000)),
        memory: memory_field(&memory, "MemTotal").unwrap_or_default(),
        memory_available: memory_field(&memory, "MemAvailable").unwrap_or_default(),
        disk_available: disk.map_or(Memory(0), |disk| Memory(disk.f_bavail.saturating_mul(disk.f_frsize))),
        ..Facts::default()
    }
}

/// Go's names, which images use, for Rust's.
fn image_architecture(name: &str) -> &str {
    match name {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// A field of `/proc/meminfo`: `MemTotal:       24684084 kB`.
fn memory_field(text: &str, name: &str) -> Option<Memory> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let (number, unit) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    let number: u64 = number.parse().ok()?;
    match unit {
        // The kernel means KiB.
        "kB" => number.checked_mul(1024).map(Memory),
        "" => Some(Memory(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let text = "MemTotal:       24684084 kB\nMemFree:        16000000 kB\nMemAvailable:   22000000 kB\nHugePages_Total:       3\n";
        assert_eq!(memory_field(text, "MemTotal"), Some(Memory(24_684_084 << 10)));
        assert_eq!(memory_field(text, "MemAvailable"), Some(Memory(22_000_000 << 10)));
        assert_eq!(memory_field(text, "HugePages_Total"), Some(Memory(3)));
        assert_eq!(memory_field(text, "Mem"), None);
        assert_eq!(memory_field("", "MemTotal"), None);
    }

    #[test]
    fn this_host_has_everything() {
        let host = host(Path::new("/nonexistent/data"));
        assert!(!host.host_name.is_empty() && !host.kernel.is_empty() && !host.architecture.is_empty());
        assert!(host.cpu.0 >= 1000);
        assert!(host.memory_available.0 > 0 && host.memory > host.memory_available);
        assert!(host.disk_available.0 > 0);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(MemTotal)?:?[ 0-9kMB\n]{0,60}|\\PC*") {
            let _ = memory_field(&text, "MemTotal");
        }
    }
}
