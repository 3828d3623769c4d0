//! The files a project is written in: found, read, checked all at once, and with the modules they name.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use orca_cluster::command::put::faults;
use orca_cluster::id::{LABEL_LENGTH_MAX, Label};
use orca_cluster::limit::MODULE_BYTES_MAX;
use orca_cluster::spec::toml::{self, FILE_BYTES_MAX, Problem, SourceFile};
use orca_cluster::spec::{Project, Settings, Source};

use crate::exit::Failure;

const SERVICE_FILE: &str = "service.toml";
const CLUSTER_FILE: &str = "cluster.toml";
const SERVICES_DIRECTORY: &str = "services";

/// What the files say.
#[derive(Debug)]
pub struct Written {
    pub projects: Vec<Project>,
    pub settings: Option<Settings>,
    /// The bytes of their modules, by hex SHA-256.
    pub modules: BTreeMap<String, Vec<u8>>,
    /// The files of the projects, in the same order.
    sources: Vec<SourceFile>,
    colour: bool,
}

impl Written {
    /// A refusal of the cluster, as problems of the files it is about where it is about files.
    pub fn place(&self, failure: Failure) -> Failure {
        let mut problems = Vec::new();
        for (project, file) in self.projects.iter().zip(&self.sources) {
            let found = toml::misfits(file, &faults(project, &failure.unfit));
            problems.extend(found.into_iter().map(|problem| (problem, file.text.clone())));
        }
        if problems.is_empty() {
            return failure;
        }
        let mut placed = refused(problems, "nothing was deployed", self.colour);
        placed.unfit.clone_from(&failure.unfit);
        placed
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    services: Vec<PathBuf>,
    settings: Option<PathBuf>,
}

/// Reads `paths`, or what the current directory holds if there are none. Every problem of every file is in the
/// failure.
pub fn read(paths: &[PathBuf], colour: bool) -> Result<Written, Failure> {
    let found = find(paths)?;
    let mut files = Vec::new();
    for path in &found.services {
        files.push((source_file(path)?, default_name(path)?));
    }
    let mut problems: Vec<(Problem, String)> = Vec::new();
    let mut note = |wrong: Vec<Problem>, files: &[&SourceFile]| {
        for problem in wrong {
            let text = files.iter().find(|file| file.name == problem.file).map(|file| file.text.clone());
            problems.push((problem, text.unwrap_or_default()));
        }
    };
    let projects = match toml::projects(&files) {
        Ok(projects) => projects,
        Err(wrong) => {
            note(wrong, &files.iter().map(|(file, _)| file).collect::<Vec<_>>());
            Vec::new()
        }
    };
    let settings = match &found.settings {
        None => None,
        Some(path) => {
            let file = source_file(path)?;
            match toml::settings(&file) {
                Ok(settings) => Some(settings),
                Err(wrong) => {
                    note(wrong, &[&file]);
                    None
                }
            }
        }
    };
    if !problems.is_empty() {
        return Err(refused(problems, "nothing was sent", colour));
    }
    let sources = files.into_iter().map(|(file, _)| file).collect();
    let mut written = Written { projects, settings, modules: BTreeMap::new(), sources, colour };
    for (project, path) in written.projects.iter_mut().zip(&found.services) {
        read_modules(project, path, &mut written.modules)?;
    }
    Ok(written)
}

fn refused(problems: Vec<(Problem, String)>, so: &str, colour: bool) -> Failure {
    let number = problems.len();
    let files: std::collections::BTreeSet<&str> = problems.iter().map(|(problem, _)| problem.file.as_str()).collect();
    let place = match files.len() {
        1 => problems[0].0.file.clone(),
        several => format!("{several} files"),
    };
    let noun = if number == 1 { "problem" } else { "problems" };
    let mut failure = Failure::input(format!("{number} {noun} in {place}; {so}"));
    for (problem, text) in problems {
        let _ = writeln!(failure.report, "{}", toml::render(&problem, &text, colour)); // Writing to a String cannot fail.
        failure.problems.push(problem);
    }
    failure
}

fn find(paths: &[PathBuf]) -> Result<Found, Failure> {
    if paths.is_empty() {
        let found = in_directory(Path::new("."))?;
        if found.services.is_empty() {
            return Err(Failure::input("there is no service.toml here, nor services/*/service.toml")
                .fix("go to the project's directory, or name a file or directory with -f")
                .fix("start a new one: orca init"));
        }
        return Ok(found);
    }
    let mut all = Found::default();
    for path in paths {
        let meta = fs::metadata(path)
            .map_err(|error| Failure::input(format!("{} cannot be read", path.display())).why(error.to_string()))?;
        if meta.is_dir() {
            let found = in_directory(path)?;
            if found.services.is_empty() && found.settings.is_none() {
                return Err(Failure::input(format!(
                    "there is no service.toml in {}, nor services/*/service.toml",
                    path.display()
                )));
            }
            all.services.extend(found.services);
            all.settings = all.settings.or(found.settings);
        } else if path.file_name().is_some_and(|name| name == CLUSTER_FILE) {
            all.settings = Some(path.clone());
        } else {
            all.services.push(path.clone());
        }
    }
    Ok(all)
}

fn in_directory(directory: &Path) -> Result<Found, Failure> {
    // As people would type it: without `./` in front.
    let join = |name: &str| if directory == Path::new(".") { PathBuf::from(name) } else { directory.join(name) };
    let mut found = Found::default();
    if join(CLUSTER_FILE).is_file() {
        found.settings = Some(join(CLUSTER_FILE));
    }
    if join(SERVICE_FILE).is_file() {
        found.services.push(join(SERVICE_FILE));
    }
    let services = join(SERVICES_DIRECTORY);
    if services.is_dir() {
        let failed = |error: std::io::Error| {
            Failure::input(format!("{} cannot be read", services.display())).why(error.to_string())
        };
        let mut below = Vec::new();
        for entry in fs::read_dir(&services).map_err(failed)? {
            let file = entry.map_err(failed)?.path().join(SERVICE_FILE);
            if file.is_file() {
                below.push(file);
            }
        }
        below.sort();
        found.services.extend(below);
    }
    Ok(found)
}

fn source_file(path: &Path) -> Result<SourceFile, Failure> {
    let failed =
        |error: std::io::Error| Failure::input(format!("{} cannot be read", path.display())).why(error.to_string());
    let mut text = String::new();
    // One byte more than is allowed, so that what is too long is seen to be.
    let limit = FILE_BYTES_MAX as u64 + 1;
    fs::File::open(path).map_err(failed)?.take(limit).read_to_string(&mut text).map_err(failed)?;
    Ok(SourceFile { name: path.display().to_string(), text })
}

/// A project that does not say is called after its directory.
pub fn default_name(path: &Path) -> Result<Label, Failure> {
    let failed =
        |error: std::io::Error| Failure::input(format!("{} cannot be read", path.display())).why(error.to_string());
    let full = fs::canonicalize(path).map_err(failed)?;
    let directory = full.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().to_lowercase());
    let name: String =
        directory.unwrap_or_default().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let name: String = name.trim_matches('-').chars().take(LABEL_LENGTH_MAX).collect();
    Ok(Label::new(name.trim_matches('-')).unwrap_or_else(|_| Label::new("default").expect("this is a label")))
}

/// Fills in the digests of the modules, and keeps their bytes.
fn read_modules(project: &mut Project, file: &Path, modules: &mut BTreeMap<String, Vec<u8>>) -> Result<(), Failure> {
    for service in project.services.values_mut() {
        let Source::Module(module) = &mut service.source else { continue };
        let path = file.parent().unwrap_or(Path::new(".")).join(&module.path);
        let name = format!("the module of `{}`, {},", service.name, path.display());
        let failed = |error: std::io::Error| {
            let fix = "build it, or correct `module`; the path is relative to the file that names it";
            Failure::input(format!("{name} cannot be read")).why(error.to_string()).fix(fix)
        };
        let mut bytes = Vec::new();
        fs::File::open(&path).map_err(failed)?.take(MODULE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MODULE_BYTES_MAX {
            let fix = "build it for release (`cargo build --release`), and strip it; large data belongs in a volume";
            let message = format!("{name} has more than {} MiB, which is the most", MODULE_BYTES_MAX >> 20);
            return Err(Failure::input(message).fix(fix));
        }
        if !bytes.starts_with(b"\0asm") {
            return Err(Failure::input(format!("{name} is no WebAssembly"))
                .why("it does not begin with the bytes \\0asm")
                .fix("build it with `cargo build --release --target wasm32-wasip2`"));
        }
        let digest = hex(digest::digest(&digest::SHA256, &bytes).as_ref());
        module.digest = Some(digest.clone());
        modules.insert(digest, bytes);
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // Writing to a String cannot fail.
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use orca_cluster::command::Refusal;

    const WEB: &str = "[[service]]\nname = \"web\"\nimage = \"nginx:1\"\nport = 80\n";

    fn write(directory: &Path, path: &str, text: &str) -> PathBuf {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn a_directory_is_a_lone_file_or_one_directory_for_each_project() {
        let tree = tempfile::tempdir().unwrap();
        write(tree.path(), "lone/My Shop/service.toml", WEB);
        let read = read(&[tree.path().join("lone/My Shop")], false).unwrap();
        assert_eq!(read.projects[0].name.as_str(), "my-shop");

        write(tree.path(), "cluster.toml", "[policy]\nallow_host = [\"network\"]\n");
        write(tree.path(), "services/blog/service.toml", WEB);
        write(tree.path(), "services/shop/service.toml", WEB);
        let read = super::read(&[tree.path().to_owned()], false).unwrap();
        let names: Vec<&str> = read.projects.iter().map(|project| project.name.as_str()).collect();
        assert_eq!(names, ["blog", "shop"]);
        assert!(read.settings.is_some());
    }

    #[test]
    fn every_problem_of_every_file_is_told_and_nothing_is_sent() {
        let tree = tempfile::tempdir().unwrap();
        write(tree.path(), "services/a/service.toml", &WEB.replace("port", "prot"));
        write(tree.path(), "services/b/service.toml", "[[service]]\nname = \"B\"\nimage = \"x\"\n");
        write(tree.path(), "cluster.toml", "[clutser]\n");
        let failure = read(&[tree.path().to_owned()], false).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.problems.len() >= 3, "{:?}", failure.problems);
        assert!(failure.message.ends_with("in 3 files; nothing was sent"), "{}", failure.message);
        assert!(
            failure.report.contains("did you mean `port`?") && failure.report.contains("^^^^"),
            "{}",
            failure.report
        );
    }

    #[test]
    fn what_the_cluster_refuses_is_underlined_where_it_is_written() {
        let tree = tempfile::tempdir().unwrap();
        let text = "project = \"shop\"\n[[service]]\nname = \"api\"\nimage = \"a\"\nport = 1\nroutes = [\"/x\", \"/api/*\"]\n\
                    depends_on = [\"db\"]\nenv = { URL = \"${secrets.USER}:${secrets.PASSWORD}\" }\n\
                    [[service]]\nname = \"db\"\nimage = \"b\"\nregistry = { username = \"u\", password = \"${secrets.KEY}\" }\n";
        let read = read(&[write(tree.path(), "service.toml", text)], false).unwrap();
        let service = |text: &str| -> orca_cluster::id::ServiceName { text.parse().unwrap() };
        let route = orca_cluster::spec::Route { host: orca_cluster::spec::Host::Any, path: "/api".to_owned() };
        let missing = [("shop/api", "PASSWORD"), ("shop/api", "USER"), ("shop/db", "KEY"), ("else/where", "KEY")];
        let missing = missing.map(|(name, secret)| (service(name), secret.to_owned())).to_vec();
        let mut failure = Failure::input("refused");
        failure.unfit = vec![
            Refusal::RouteTaken { service: service("shop/api"), route, owner: service("hello/web") },
            Refusal::SecretsMissing { missing },
        ];
        let placed = read.place(failure);
        let told: Vec<String> = placed
            .problems
            .iter()
            .map(|problem| format!("{}:{} {}", problem.line, problem.column, problem.message))
            .collect();
        expect_test::expect![[r#"
            6:17 `/api/*` is already routed to `hello/web`
            8:15 `api` needs secret PASSWORD, which is not set
            8:15 `api` needs secret USER, which is not set
            12:41 `db` needs secret KEY, which is not set"#]]
        .assert_eq(&told.join("\n"));
        assert!(placed.message.starts_with("4 problems in ") && placed.report.contains("^^^"), "{}", placed.report);
        assert!(placed.report.contains("hint: orca secrets set KEY --project shop"), "{}", placed.report);
        assert_eq!(read.place(Failure::input("of nothing in the files")).message, "of nothing in the files");
    }

    #[test]
    fn a_host_of_another_project_is_underlined_where_it_is_written() {
        let tree = tempfile::tempdir().unwrap();
        for (written, place) in
            [("domain = \"WWW.a.test\"", "5:10"), ("domains = [\"b.test\", \"www.a.test\"]", "5:22")]
        {
            let text =
                format!("[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 80\n{written}\nroutes = [\"/x\"]\n");
            let read = read(&[write(tree.path(), "blog/service.toml", &text)], false).unwrap();
            let (service, owner) = ("blog/web".parse().unwrap(), "shop/web".parse().unwrap());
            let host = |text: &str| Box::new(text.parse().unwrap());
            let mut failure = Failure::input("refused");
            failure.unfit =
                vec![Refusal::HostTaken { service, host: host("www.a.test"), owner, held: host("*.a.test") }];
            let placed = read.place(failure);
            let [problem] = &placed.problems[..] else { panic!("{placed:?}") };
            assert_eq!(format!("{}:{}", problem.line, problem.column), place, "{written}");
        }
    }

    #[test]
    fn the_examples_can_run_beside_each_other() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let written = read(&[examples.join("hello"), examples.join("shop")], false);
        let written = written.unwrap_or_else(|failure| panic!("{failure}\n{}", failure.report));
        assert_eq!(written.projects.len(), 2);
    }

    #[test]
    fn a_module_is_read_beside_its_file_and_known_by_its_digest() {
        let tree = tempfile::tempdir().unwrap();
        let file = write(tree.path(), "p/service.toml", "[[service]]\nname = \"web\"\nmodule = \"./web.wasm\"\n");
        let missing = read(std::slice::from_ref(&file), false).unwrap_err();
        assert!(missing.message.contains("web.wasm"), "{}", missing.message);
        write(tree.path(), "p/web.wasm", "hello");
        assert!(read(std::slice::from_ref(&file), false).unwrap_err().message.contains("no WebAssembly"));
        // As large as a control node takes, and one byte more.
        let large = write(tree.path(), "p/web.wasm", "\0asm");
        fs::File::options().write(true).open(large).unwrap().set_len(64 * 1024 * 1024 + 1).unwrap();
        let refused = read(std::slice::from_ref(&file), false).unwrap_err();
        assert!(refused.message.contains("has more than 64 MiB"), "{}", refused.message);
        write(tree.path(), "p/web.wasm", "\0asm");
        let read = read(&[file], false).unwrap();
        let digest = "cd5d4935a48c0672cb06407bb443bc0087aff947c6b864bac886982c73b3027f";
        assert_eq!(read.modules.keys().collect::<Vec<_>>(), [digest]);
    }
}
