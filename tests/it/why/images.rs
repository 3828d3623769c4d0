//! Images that cannot run, each in a way of its own: made from scratch, as they are wrong in what they lack.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tags of this run of the tests alone.
#[derive(Debug)]
pub struct Images {
    name: String,
    made: Vec<String>,
}

impl Images {
    pub fn build() -> Images {
        let mut images = Images { name: format!("orca-test/why-{}", std::process::id()), made: Vec::new() };
        images.make("no-mode", |root| file(&root.join("run"), "#!/bin/sh\n", 0o644));
        images.make("no-shell", |root| file(&root.join("run"), "#!/bin/sh\necho up\n", 0o755));
        images.make("no-format", |root| file(&root.join("run"), "echo up\n", 0o755));
        images.make("no-file", |root| file(&root.join("readme"), "nothing to run\n", 0o644));
        images.make("no-library", |root| {
            fs::copy("/bin/ls", root.join("run")).unwrap();
            // The loader is there, and none of what it is to load.
            let loader = loader("/bin/ls");
            let inside = root.join(loader.strip_prefix("/").unwrap());
            fs::create_dir_all(inside.parent().unwrap()).unwrap();
            fs::copy(fs::canonicalize(&loader).unwrap(), inside).unwrap();
        });
        images
    }

    /// As a service file names it.
    pub fn tag(&self, which: &str) -> String {
        format!("{}:{which}", self.name)
    }

    fn make(&mut self, which: &str, fill: impl FnOnce(&Path)) {
        let root = tempfile::tempdir().unwrap();
        fill(root.path());
        let mut tar = Command::new("tar");
        tar.args(["--create", "--owner=0", "--group=0", "--directory"]).arg(root.path()).arg(".");
        let mut tar = tar.stdout(Stdio::piped()).spawn().unwrap();
        let tag = self.tag(which);
        let mut import = Command::new("docker");
        import.args(["import", "--change", "ENTRYPOINT [\"/run\"]", "-", &tag]);
        import.stdin(tar.stdout.take().unwrap()).stdout(Stdio::null());
        assert!(import.status().unwrap().success() && tar.wait().unwrap().success(), "cannot make {tag}");
        self.made.push(tag);
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        for tag in &self.made {
            // A container that is still being removed may hold it.
            drop(
                Command::new("docker")
                    .args(["rmi", "--force", tag])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status(),
            );
        }
    }
}

fn file(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The program that a dynamically linked one is started by: `/lib64/ld-linux-x86-64.so.2 (0x…)` of what ldd prints.
fn loader(program: &str) -> PathBuf {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let word = listed.split_whitespace().find(|word| word.starts_with('/') && word.contains("/ld-"));
    word.unwrap_or_else(|| panic!("{program} is linked statically: {listed}")).into()
}
