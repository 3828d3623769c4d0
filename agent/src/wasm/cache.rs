//! Compiled modules on disk. Compiling takes a second or so; reading the result back takes less than a request.
//!
//! A file is found by what it was compiled from and by what: the module's digest in its name, and a key made of
//! wasmtime's version and every setting that changes the code. It carries a checksum over both and over the code.
//! A file that is not exactly what this process would have written is not there: it is compiled again.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use aws_lc_rs::digest::{Context, SHA256, SHA256_OUTPUT_LEN, digest};

use crate::module_files;

/// The first bytes of a file, with the version of its layout.
const MAGIC: &[u8; 16] = b"orca compiled 1\n";
const HEADER_BYTES: usize = MAGIC.len() + SHA256_OUTPUT_LEN;
/// Largest compiled module that is read: four times what the largest known interpreters compile to.
const CODE_BYTES_MAX: u64 = 512 << 20;

/// Code that may be run as it is: what `precompile_component` of this very wasmtime, set up like the cache's engine,
/// returned. Only [`Cache::read`] makes one, from a file that
///
/// 1. carries a checksum over its content, its module's digest and the key of the engine (wasmtime's version and every
///    setting that shapes code), so it is whole and was written by a process that compiled this module so; and
/// 2. belongs to our user and can be written by nobody else, so that process was ours: whoever can forge it can replace
///    this program as well.
///
/// The bytes were read into our memory before they were checked, and nobody can change them in between.
pub(super) struct Trusted(Vec<u8>);

#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
    /// What compiles: only its own output is of use.
    compiler: String,
}

impl Cache {
    pub(super) fn open(directory: PathBuf, engine: &wasmtime::Engine) -> io::Result<Cache> {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let mut compiler = Sha256(Context::new(&SHA256));
        // Of wasmtime's version, the target and every setting that changes code.
        engine.precompile_compatibility_hash().hash(&mut compiler);
        let mut compiler = hex(compiler.0.finish().as_ref());
        compiler.truncate(16);
        Ok(Cache { directory, compiler })
    }

    /// The code for a module, if it is here, whole, and ours.
    pub(super) fn read(&self, module_digest: &str) -> io::Result<Option<Trusted>> {
        let path = self.path(module_digest);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        // Code that another user could have put here is never run.
        let ours = metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
        if !ours || metadata.len() > CODE_BYTES_MAX {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
        file.read_to_end(&mut bytes)?;
        if bytes.len() < HEADER_BYTES || bytes[..HEADER_BYTES] != self.header(module_digest, &bytes[HEADER_BYTES..]) {
            return Ok(None);
        }
        // For the choice of what goes first. A file that cannot be touched only goes earlier.
        let _ = file.set_modified(SystemTime::now());
        bytes.drain(..HEADER_BYTES);
        Ok(Some(Trusted(bytes)))
    }

    /// Writes the code of a module, whole or not at all, also if the machine loses power.
    pub(super) fn write(&self, module_digest: &str, code: &[u8]) -> io::Result<()> {
        let path = self.path(module_digest);
        let new = path.with_extension(format!("{}.new", std::process::id()));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&self.header(module_digest, code))?;
        file.write_all(code)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(&self.directory)?.sync_all()
    }

    fn header(&self, module_digest: &str, code: &[u8]) -> [u8; HEADER_BYTES] {
        let mut context = Context::new(&SHA256);
        for part in [self.compiler.as_bytes(), module_digest.as_bytes(), code] {
            // With its length, so that no two different lists of parts are the same bytes.
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let mut header = [0; HEADER_BYTES];
        header[..MAGIC.len()].copy_from_slice(MAGIC);
        header[MAGIC.len()..].copy_from_slice(context.finish().as_ref());
        header
    }

    pub(super) fn path(&self, module_digest: &str) -> PathBuf {
        self.directory.join(format!("{module_digest}{}", self.suffix()))
    }

    fn suffix(&self) -> String {
        format!("-{}.cwasm", self.compiler)
    }

    /// Lets go of the code of modules that are not needed any more, and of what another version has compiled.
    pub(super) fn sweep(&self, named: &BTreeSet<String>) -> io::Result<()> {
        module_files::sweep(&self.directory, &self.suffix(), named)
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl AsRef<[u8]> for Trusted {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Hex SHA-256 of a module, by which it is known.
pub fn module_digest(module: &[u8]) -> String {
    hex(digest(&SHA256, module).as_ref())
}

struct Sha256(Context);

impl Hasher for Sha256 {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        unreachable!("the whole digest is taken, not 64 bits of it")
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}
