//! Builds the Wasm components that are committed beside their sources: the examples people start from, and the
//! fixtures the tests call.
//!
//! They are committed so that a clone runs without a compiler for wasm32, and rebuilt in CI so that what is
//! committed is what the source says. There are two ways to build one, the first that is there is taken:
//! `rustup target add wasm32-wasip2`; or a compiler that came with the source of its standard library (Debian:
//! `rustc-web`, `rust-web-src`), for `wasm32-unknown-unknown`, whose output is then wrapped as a component.
//! Two compilers do not write the same bytes. Each component therefore names its compiler, in its standard
//! `producers` section, and is compared only by the same one.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use wasm_metadata::{AddMetadata, Producers};
use wit_component::ComponentEncoder;

/// A component: the crate it is built from and where it is committed, both from the root of the repository.
struct Guest {
    crate_dir: &'static str,
    crate_name: &'static str,
    committed: &'static str,
}

const GUESTS: [Guest; 4] = [
    Guest { crate_dir: "examples/hello", crate_name: "hello", committed: "examples/hello/hello.wasm" },
    Guest { crate_dir: "examples/shop/pricing", crate_name: "pricing", committed: "examples/shop/pricing.wasm" },
    Guest { crate_dir: "tests/fixtures/probe", crate_name: "probe", committed: "tests/fixtures/probe.wasm" },
    Guest { crate_dir: "tests/fixtures/task", crate_name: "task", committed: "tests/fixtures/task.wasm" },
];

/// Builds every component and writes it where it is committed.
pub fn build(root: &Path) -> Result<()> {
    let compiler = Compiler::find()?;
    eprintln!("components are built by {}", compiler.label);
    for guest in &GUESTS {
        let bytes = compiler.build(root, guest)?;
        fs::write(root.join(guest.committed), &bytes)
            .with_context(|| format!("could not write {}", guest.committed))?;
        eprintln!("  {} ({} KB)", guest.committed, bytes.len().div_ceil(1000));
    }
    Ok(())
}

/// What [`verify`] found out about the committed components.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Rebuilt, and the same to the byte.
    pub same: usize,
    /// Built by a compiler that is not here. Each was named on stderr.
    pub not_compared: usize,
}

/// Rebuilds every component whose compiler is here and fails if one is not what is committed.
pub fn verify(root: &Path) -> Result<Verified> {
    let compiler = Compiler::find();
    let mut verified = Verified::default();
    let mut stale = Vec::new();
    for guest in &GUESTS {
        let committed = fs::read(root.join(guest.committed))
            .with_context(|| format!("could not read {}; run `cargo xtask wasm build`", guest.committed))?;
        let built_by = built_by(&committed).unwrap_or_else(|| "an unnamed compiler".to_owned());
        match &compiler {
            Ok(compiler) if compiler.label == built_by => {
                if compiler.build(root, guest)? == committed {
                    verified.same += 1;
                } else {
                    stale.push(guest.committed);
                }
            }
            Ok(compiler) => {
                verified.not_compared += 1;
                eprintln!("{} was built by {built_by}; here is {}", guest.committed, compiler.label);
            }
            Err(none) => {
                verified.not_compared += 1;
                eprintln!("{} was built by {built_by}; {none}", guest.committed);
            }
        }
    }
    let Verified { same, not_compared } = verified;
    eprintln!("components: {same} as committed, {not_compared} not compared");
    ensure!(stale.is_empty(), "{} no longer match their sources; run `cargo xtask wasm build`", stale.join(", "));
    Ok(verified)
}

struct Compiler {
    rustc: PathBuf,
    sysroot: PathBuf,
    way: Way,
    /// Version and target, as the components carry it.
    label: String,
}

enum Way {
    /// The target is installed; cargo writes components.
    Installed,
    /// The standard library is compiled too, and linked by the `rust-lld` of any toolchain.
    WithStandardLibrary { linker: PathBuf },
}

const COMPONENT_TARGET: &str = "wasm32-wasip2";
const CORE_TARGET: &str = "wasm32-unknown-unknown";

impl Compiler {
    fn find() -> Result<Compiler> {
        let candidates = [env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from), "/usr/bin/rustc".into()];
        let sysroots: Vec<(PathBuf, PathBuf)> =
            candidates.into_iter().filter_map(|rustc| Some((rustc.clone(), sysroot(&rustc)?))).collect();
        for (rustc, sysroot) in &sysroots {
            if sysroot.join("lib/rustlib").join(COMPONENT_TARGET).is_dir() {
                return Compiler::new(rustc, sysroot, Way::Installed, COMPONENT_TARGET);
            }
        }
        let linker = sysroots.iter().find_map(|(_, sysroot)| linker(sysroot));
        for (rustc, sysroot) in &sysroots {
            if let Some(linker) = &linker
                && sysroot.join("lib/rustlib/src/rust/library/std").is_dir()
            {
                let way = Way::WithStandardLibrary { linker: linker.clone() };
                return Compiler::new(rustc, sysroot, way, CORE_TARGET);
            }
        }
        bail!(
            "no compiler for wasm32 is here: run `rustup target add {COMPONENT_TARGET}`, \
             or on Debian `apt-get install rustc-web rust-web-src`"
        )
    }

    fn new(rustc: &Path, sysroot: &Path, way: Way, target: &str) -> Result<Compiler> {
        let version = output(rustc, &["--version"]).with_context(|| format!("{} does not run", rustc.display()))?;
        let label = format!("{version} for {target}");
        Ok(Compiler { rustc: rustc.to_owned(), sysroot: sysroot.to_owned(), way, label })
    }

    fn build(&self, root: &Path, guest: &Guest) -> Result<Vec<u8>> {
        let target_dir = root.join("target/components");
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .current_dir(root.join(guest.crate_dir))
            .args(["build", "--quiet", "--release", "--locked", "--target-dir"])
            .arg(&target_dir)
            .env("RUSTC", &self.rustc)
            .env("CARGO_ENCODED_RUSTFLAGS", self.remapped(root)?);
        let target = match &self.way {
            Way::Installed => {
                cargo.args(["--target", COMPONENT_TARGET]);
                COMPONENT_TARGET
            }
            Way::WithStandardLibrary { linker } => {
                cargo
                    .args(["--target", CORE_TARGET, "-Z", "build-std=std,panic_abort"])
                    .env("RUSTC_BOOTSTRAP", "1")
                    .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
                CORE_TARGET
            }
        };
        let status = cargo.status().context("cargo does not run")?;
        ensure!(status.success(), "{} does not build", guest.crate_dir);

        let file = target_dir.join(target).join("release").join(guest.crate_name).with_extension("wasm");
        let mut bytes = fs::read(&file).with_context(|| format!("could not read {}", file.display()))?;
        if let Way::WithStandardLibrary { .. } = self.way {
            bytes = ComponentEncoder::default()
                .module(&bytes)
                .and_then(|encoder| encoder.validate(true).encode())
                .with_context(|| format!("{} is no component", guest.crate_name))?;
        }
        let mut metadata = AddMetadata::default();
        metadata.processed_by = vec![(PRODUCER.to_owned(), self.label.clone())];
        metadata.to_wasm(&bytes).with_context(|| format!("could not name the compiler in {}", guest.crate_name))
    }

    /// Flags that take the paths of this machine out of panic messages: they are nobody's business, and would make
    /// the bytes differ from one machine to the next.
    fn remapped(&self, root: &Path) -> Result<OsString> {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
            .context("neither CARGO_HOME nor HOME is set")?;
        let mut from = vec![(root.to_owned(), "/orca"), (self.sysroot.join("lib/rustlib/src/rust"), "/rustc")];
        // Each registry has a directory named after it.
        if let Ok(registries) = fs::read_dir(home.join("registry/src")) {
            for registry in registries {
                from.push((registry?.path(), "/crates"));
            }
        }
        let mut flags = OsString::new();
        for (path, to) in from {
            if !flags.is_empty() {
                flags.push("\u{1f}");
            }
            flags.push("--remap-path-prefix=");
            flags.push(path);
            flags.push("=");
            flags.push(to);
        }
        Ok(flags)
    }
}

/// The name under which the compiler stands in the `producers` section.
const PRODUCER: &str = "cargo xtask wasm";

fn built_by(component: &[u8]) -> Option<String> {
    let producers = Producers::from_wasm(component).ok()??;
    producers.get("processed-by")?.get(PRODUCER).cloned()
}

fn sysroot(rustc: &Path) -> Option<PathBuf> {
    output(rustc, &["--print", "sysroot"]).map(PathBuf::from)
}

fn linker(sysroot: &Path) -> Option<PathBuf> {
    fs::read_dir(sysroot.join("lib/rustlib"))
        .ok()?
        .filter_map(|host| Some(host.ok()?.path().join("bin/rust-lld")))
        .find(|lld| lld.is_file())
}

fn output(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
