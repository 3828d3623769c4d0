//! A registry of the test's own, on a free port of this machine.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::wait::{PATIENCE, wait_until};

/// Of a password that no test knows.
pub const PASSWORD_HASH: &str = "$2b$05$abcdefghijklmnopqrstuufNWTq9mSgOPNieerXLd5jRtarfgMCU2";

#[derive(Debug)]
pub struct Registry {
    process: Child,
    pub address: String,
    _place: TempDir,
}

impl Registry {
    /// With a hash, only for the user `reader`.
    pub fn start(password_hash: Option<&str>) -> Registry {
        let place = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let storage = place.path().join("storage");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: \"{address}\"}}\n",
            storage.display()
        );
        if let Some(hash) = password_hash {
            let file = place.path().join("htpasswd");
            std::fs::write(&file, format!("reader:{hash}\n")).unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display()));
        }
        let file = place.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry is missing; `cargo xtask test` installs it");
        wait_until("the registry", PATIENCE, || TcpStream::connect(&address).is_ok());
        Registry { process, address, _place: place }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // One that has ended by itself needs neither.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
