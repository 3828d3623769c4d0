//! A Docker engine for the tests, and the images they run. No registry is asked for anything: images are made here,
//! from scratch, of programs that need nothing else. What is there already is left as it is.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

/// An engine answers within a second when nothing is wrong; a loaded machine may need a few more.
const ENGINE_START_MAX: Duration = Duration::from_secs(60);
const ENGINE_LOG: &str = "/var/log/orca-test-dockerd.log";
/// Names an image's inputs, so that it is built again only when they have changed.
const INPUTS_LABEL: &str = "orca.test.inputs";

/// Makes sure that a Docker engine answers. As root on Debian it installs and starts what is missing, and the engine
/// outlives this process; otherwise it says what to do.
pub fn ensure_engine() -> Result<()> {
    if engine_answers() {
        return ensure_registry();
    }
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    ensure!(host.is_empty(), "no Docker engine answers at DOCKER_HOST={host}; start it, or unset the variable");
    ensure!(is_root(), "{}", advice());
    if !is_installed("dockerd") {
        install("docker.io")?;
    }
    ensure_registry()?;
    start_engine()?;
    let deadline = Instant::now() + ENGINE_START_MAX;
    while !engine_answers() {
        ensure!(
            Instant::now() < deadline,
            "dockerd does not answer after {ENGINE_START_MAX:?}; its log is {ENGINE_LOG}"
        );
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The tests of pulling run a registry of their own.
fn ensure_registry() -> Result<()> {
    if is_installed("docker-registry") {
        return Ok(());
    }
    ensure!(is_root(), "the tests of pulling need `docker-registry`: sudo apt-get install docker-registry");
    install("docker-registry")
}

fn engine_answers() -> bool {
    let mut command = Command::new("docker");
    command.args(["version", "--format", "{{.Server.Version}}"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    run_for_text(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's PATH may lack the directories of daemons.
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).any(|directory| directory.join(program).is_file())
}

/// What someone who is not root has to do, by what is missing.
fn advice() -> &'static str {
    let socket = fs::metadata("/var/run/docker.sock").is_ok_and(|m| m.file_type().is_socket());
    if !is_installed("dockerd") {
        "the tests need a Docker engine: sudo apt-get install docker.io"
    } else if socket {
        "the Docker engine does not let this user in: sudo usermod -aG docker $USER, then log in again"
    } else {
        "no Docker engine runs: sudo systemctl start docker"
    }
}

fn install(package: &str) -> Result<()> {
    ensure!(is_installed("apt-get"), "{package} is missing and this is no Debian: install it by hand");
    let mut install = Command::new("apt-get");
    install.args(["install", "--yes", "--no-install-recommends", package]).env("DEBIAN_FRONTEND", "noninteractive");
    if run(&mut install).is_err() {
        // The lists of packages may be absent or old.
        run(Command::new("apt-get").arg("update"))?;
        run(&mut install)?;
    }
    Ok(())
}

fn start_engine() -> Result<()> {
    if Path::new("/run/systemd/system").exists() {
        return run(Command::new("systemctl").args(["start", "docker"]));
    }
    let log = File::create(ENGINE_LOG).with_context(|| format!("cannot write {ENGINE_LOG}"))?;
    // A session of its own: no terminal's or process group's end takes the engine along.
    let mut command = Command::new("setsid");
    command.args(["--fork", "dockerd", "--log-level", "warn"]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    let status = command.status().context("cannot run setsid")?;
    ensure!(status.success(), "cannot start dockerd: {status}");
    Ok(())
}

/// Builds the images of the tests and the examples: `orca-test/app:{1,2,3,wrongarch}`, `orca-test/bare:1`
/// and `orca-example/redis:7`.
/// `root` is the workspace.
pub fn build_images(root: &Path) -> Result<()> {
    let built = root.join("target/images");
    build_app(root, &built)?;
    build_redis(&built)
}

fn build_app(root: &Path, built: &Path) -> Result<()> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root).args(["rustc", "--quiet", "--package", "orca-test-app"]);
    cargo.arg("--target-dir").arg(root.join("target")).arg("--");
    // For this one crate only, so that nothing else is built again.
    cargo.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"]);
    run(&mut cargo)?;

    let files = built.join("app");
    renew(&files)?;
    let program = files.join("orca-test-app");
    fs::copy(root.join("target/debug/orca-test-app"), &program).context("cannot copy orca-test-app")?;
    fs::create_dir(files.join("tmp"))?;
    let inputs = hash_of(&program)?;
    for version in ["1", "2", "3"] {
        let changes = [format!("ENV VERSION={version}"), entry_point("/orca-test-app"), "EXPOSE 8080".to_owned()];
        import(&files, &format!("orca-test/app:{version}"), inputs, &changes)?;
    }
    // Without an entry point, so that a service's `command` is the whole command.
    import(&files, "orca-test/bare:1", inputs, &[r#"CMD ["/orca-test-app"]"#.to_owned()])?;
    load_foreign(&files, "orca-test/app:wrongarch", inputs, built)
}

/// Redis as Debian packages it, with the shared libraries it names and nothing else.
fn build_redis(built: &Path) -> Result<()> {
    const TAG: &str = "orca-example/redis:7";
    if image_inputs(TAG).is_some() {
        return Ok(());
    }
    ensure!(is_installed("apt-get"), "{TAG} is made of Debian's redis-server package, and this is no Debian");
    let (packages, unpacked, files) = (built.join("redis-packages"), built.join("redis-unpacked"), built.join("redis"));
    for directory in [&packages, &unpacked, &files] {
        renew(directory)?;
    }
    download("redis-server", &packages)?;
    for package in fs::read_dir(&packages)? {
        let package = package?.path();
        if package.extension().is_some_and(|e| e == "deb") {
            run(Command::new("dpkg").arg("--extract").args([&package, &unpacked]))?;
        }
    }
    for program in ["usr/bin/redis-check-rdb", "usr/bin/redis-cli"] {
        copy_with_libraries(&unpacked, program, &files)?;
    }
    // The server is the same program by another name.
    symlink("redis-check-rdb", files.join("usr/bin/redis-server"))?;
    fs::create_dir(files.join("data"))?;
    fs::create_dir(files.join("tmp"))?;
    let changes = [
        r#"ENTRYPOINT ["/usr/bin/redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data"]"#
            .to_owned(),
        "ENV PATH=/usr/bin".to_owned(),
        "EXPOSE 6379".to_owned(),
    ];
    import(&files, TAG, 0, &changes)
}

/// Fetches the package, and those of its dependencies that this machine lacks, without installing any.
fn download(package: &str, to: &Path) -> Result<()> {
    fs::create_dir_all(to.join("partial"))?;
    let archives = format!("Dir::Cache::archives={}", to.display());
    let mut apt = Command::new("apt-get");
    apt.args(["install", "--yes", "--no-install-recommends", "--download-only", "--reinstall"]);
    // As an ordinary user too: only the downloads directory is written to.
    apt.args(["-o", "Debug::NoLocking=1", "-o", &archives, package, "redis-tools"]);
    if run(&mut apt).is_err() {
        run(Command::new("apt-get").arg("update")).context("cannot update the lists of packages")?;
        run(&mut apt)?;
    }
    Ok(())
}

fn copy_with_libraries(unpacked: &Path, program: &str, to: &Path) -> Result<()> {
    let source = unpacked.join(program);
    copy_to(&source, &to.join(program))?;
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu"];
    let search: Vec<_> = libraries.iter().map(|l| unpacked.join(l).display().to_string()).collect();
    let listing = run_for_text(Command::new("ldd").arg(&source).env("LD_LIBRARY_PATH", search.join(":")))?;
    for line in listing.lines() {
        ensure!(!line.contains("not found"), "{program} needs a library that is not here: {}", line.trim());
        // `libm.so.6 => /lib/libm.so.6 (0x…)`, or `/lib64/ld-linux-x86-64.so.2 (0x…)` for the loader itself.
        let path = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        let Some(path) = path.split(' ').next().filter(|path| path.starts_with('/')) else { continue };
        let path = Path::new(path);
        let inside = path.strip_prefix(unpacked).unwrap_or(path);
        copy_to(path, &to.join(inside.strip_prefix("/").unwrap_or(inside)))?;
    }
    Ok(())
}

/// Copies a file, and the target of a link under the link's name.
fn copy_to(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file has a directory")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// Makes an image of the files below a directory, unless there is one of the same inputs.
pub fn import(files: &Path, tag: &str, inputs: u64, changes: &[String]) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    (inputs, changes).hash(&mut hasher);
    let inputs = format!("{:016x}", hasher.finish());
    if image_inputs(tag).is_some_and(|had| had == inputs) {
        return Ok(());
    }
    let mut tar = tar(files).stdout(Stdio::piped()).spawn().context("cannot run tar")?;
    let mut import = Command::new("docker");
    import.arg("import");
    for change in changes.iter().chain([&format!("LABEL {INPUTS_LABEL}={inputs}")]) {
        import.args(["--change", change]);
    }
    import.args(["-", tag]).stdin(tar.stdout.take().context("tar's output is piped")?);
    run(&mut import)?;
    ensure!(tar.wait()?.success(), "tar failed for {tag}");
    writeln!(std::io::stderr(), "built {tag}")?;
    Ok(())
}

/// Makes an image that says it is for another architecture. `docker import` cannot, so it is written out as `docker
/// save` would have, and loaded.
fn load_foreign(files: &Path, tag: &str, inputs: u64, built: &Path) -> Result<()> {
    let inputs = format!("{inputs:016x}");
    if image_inputs(tag).is_some_and(|had| had == inputs) {
        return Ok(());
    }
    let saved = built.join("foreign");
    renew(&saved)?;
    let layer = saved.join("layer.tar");
    run(tar(files).stdout(File::create(&layer)?))?;
    let sum = run_for_text(Command::new("sha256sum").arg(&layer))?;
    let digest = sum.split(' ').next().context("sha256sum printed nothing")?;
    let architecture = if std::env::consts::ARCH == "aarch64" { "amd64" } else { "arm64" };
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{"Entrypoint":["/orca-test-app"],"Labels":{{"{INPUTS_LABEL}":"{inputs}"}}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{digest}"]}}}}"#
    );
    fs::write(saved.join("config.json"), config)?;
    let manifest = format!(r#"[{{"Config":"config.json","RepoTags":["{tag}"],"Layers":["layer.tar"]}}]"#);
    fs::write(saved.join("manifest.json"), manifest)?;
    let archive = built.join("foreign.tar");
    run(tar(&saved).stdout(File::create(&archive)?))?;
    run(Command::new("docker").arg("load").stdin(File::open(&archive)?))?;
    writeln!(std::io::stderr(), "built {tag}")?;
    Ok(())
}

/// The files below a directory, the same bytes each time they are the same.
fn tar(files: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "--sort=name", "--directory"]);
    tar.arg(files).arg(".");
    tar
}

/// The label of an image that names its inputs.
fn image_inputs(tag: &str) -> Option<String> {
    let format = format!("{{{{index .Config.Labels {INPUTS_LABEL:?}}}}}");
    let text = run_for_text(Command::new("docker").args(["image", "inspect", "--format", &format, tag])).ok()?;
    Some(text.trim().to_owned()).filter(|label| !label.is_empty())
}

pub fn entry_point(program: &str) -> String {
    format!("ENTRYPOINT [{program:?}]")
}

pub fn hash_of(file: &Path) -> Result<u64> {
    let mut bytes = Vec::new();
    File::open(file)?.read_to_end(&mut bytes)?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Ok(hasher.finish())
}

/// An empty directory in this place.
pub fn renew(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

/// Runs a command in silence; its output becomes the error if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    run_for_text(command).map(drop)
}

fn run_for_text(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
