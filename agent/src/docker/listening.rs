//! Which sockets a replica's processes listen on: the evidence when a probe cannot reach it. Read from the kernel's
//! tables of the container's network namespace, which an agent that is not root may not see.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use orca_cluster::id::ReplicaId;

use super::Docker;

/// `TCP_LISTEN` of the kernel's enum, as the tables show it.
const LISTEN: &str = "0A";
/// Docker answers a container's name look-ups on this address inside its namespace.
const DOCKER_RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));

impl Docker {
    /// [`None`] where that cannot be seen. On the host's network it would show everybody's sockets, so it is not.
    pub async fn listening(&self, replica: ReplicaId) -> Option<Vec<SocketAddr>> {
        let (pid, is_on_host_network) = self.process(replica).await?;
        if is_on_host_network {
            return None;
        }
        let mut sockets = Vec::new();
        for table in ["tcp", "tcp6"] {
            let text = tokio::fs::read_to_string(format!("/proc/{pid}/net/{table}")).await;
            match text {
                Ok(text) => sockets.extend(listening(&text)),
                // A kernel without IPv6 has no such table.
                Err(error) if table == "tcp6" && error.kind() == std::io::ErrorKind::NotFound => {}
                Err(_) => return None,
            }
        }
        sockets.retain(|socket| socket.ip() != DOCKER_RESOLVER);
        sockets.sort_unstable();
        sockets.dedup();
        Some(sockets)
    }
}

/// Who listens on a port of this host: `nginx (process 812)`. [`None`] if nobody does; a process of another user may
/// keep its name to itself.
pub(super) fn holder(port: u16) -> Option<String> {
    let mut taken = false;
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        for inode in inodes(&text, port) {
            taken = true;
            if let Some(owner) = owner(inode) {
                return Some(owner);
            }
        }
    }
    taken.then(|| "a process of another user".to_owned())
}

/// The inodes of the sockets in LISTEN on this port.
fn inodes(table: &str, port: u16) -> impl Iterator<Item = &str> {
    table.lines().skip(1).filter_map(move |line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_it = *words.get(3)? == LISTEN && socket(words.get(1)?)?.port() == port;
        if is_it { words.get(9).copied() } else { None }
    })
}

fn owner(inode: &str) -> Option<String> {
    let wanted = format!("socket:[{inode}]");
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // Processes that end meanwhile, or may not be looked at, are not it.
    let holds = |pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.filter_map(|file| fs::read_link(file.path()).ok()).any(|link| link.as_os_str() == wanted.as_str())
    };
    let pid = { pids }.find(holds)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("{} (process {pid})", name.trim()))
}

/// The local addresses of the sockets in LISTEN in `/proc/net/tcp` or `/proc/net/tcp6`.
fn listening(table: &str) -> impl Iterator<Item = SocketAddr> {
    table.lines().skip(1).filter_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        if state == LISTEN { socket(local) } else { None }
    })
}

/// `0100007F:1F90`: the address as 32-bit words in the machine's own byte order, the port as a number.
fn socket(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    if !address.is_ascii() {
        return None;
    }
    let word = |at: usize| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some((ip, port).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_sockets_in_listen_are_taken() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 100 1 0 100 0 0 10 0
   1: 0200A8C0:0050 0300A8C0:C001 01 00000000:00000000 00:00000000 00000000     0        0 101 1 0 20 4 30 10 -1
";
        if cfg!(target_endian = "little") {
            assert_eq!(listening(table).collect::<Vec<_>>(), ["127.0.0.1:8080".parse().unwrap()]);
        }
        assert_eq!(listening("").count(), 0);
    }

    #[test]
    fn the_holder_of_a_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let holder = holder(port).unwrap();
        assert!(holder.ends_with(&format!("(process {})", std::process::id())), "{holder}");
        drop(listener);
        assert_eq!(super::holder(port), None);
    }

    /// As the kernel writes them (`tcp4_seq_show`, `tcp6_seq_show`).
    fn written(socket: SocketAddr) -> String {
        let bytes = match socket.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let words = bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        let words: String = words.map(|word| format!("{word:08X}")).collect();
        format!("{words}:{:04X}", socket.port())
    }

    proptest! {
        #[test]
        fn addresses_are_read_as_the_kernel_writes_them(ip: IpAddr, port: u16) {
            prop_assert_eq!(socket(&written((ip, port).into())), Some((ip, port).into()));
        }

        #[test]
        fn no_table_panics(text in "\\PC*", rest in "[ 0-9A-F:\n]{0,200}") {
            listening(&text).count();
            listening(&rest).count();
            let _ = socket(&text);
        }
    }
}
