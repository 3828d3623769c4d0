//! `init`: a file to start from. Every template is parsed by a test, so none can be out of date.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::ValueEnum as _;
use orca_cluster::id::Label;
use serde::Serialize;

use super::done;
use crate::cli::{InitArgs, Template};
use crate::exit::Failure;
use crate::files;
use crate::output::Output;
use crate::output::text::{Ink, Side, Text, table};

/// What a template is, and what to do once it is written.
struct Starter {
    sentence: &'static str,
    text: &'static str,
    /// What makes what it runs, if somebody has to.
    build: Option<&'static str>,
    /// The secret it refers to, if there is one.
    secret: Option<&'static str>,
}

fn starter(template: Template) -> Starter {
    let (sentence, text, build, secret) = match template {
        Template::Web => ("an HTTP service from an image", include_str!("init/web.toml"), None, None),
        Template::Wasm => (
            "an HTTP service from a Wasm component",
            include_str!("init/wasm.toml"),
            Some("cargo build --release --target wasm32-wasip2"),
            None,
        ),
        Template::Static => {
            ("a static site, served by nginx from an image", include_str!("init/static.toml"), None, None)
        }
        Template::Worker => ("a process without a port", include_str!("init/worker.toml"), None, None),
        Template::Postgres => {
            ("PostgreSQL with a volume", include_str!("init/postgres.toml"), None, Some("POSTGRES_PASSWORD"))
        }
        Template::Redis => ("Redis with a volume", include_str!("init/redis.toml"), None, None),
        Template::Wordpress => {
            ("WordPress with MariaDB", include_str!("init/wordpress.toml"), None, Some("WORDPRESS_DB_PASSWORD"))
        }
        Template::N8n => ("n8n, workflow automation", include_str!("init/n8n.toml"), None, Some("N8N_ENCRYPTION_KEY")),
    };
    Starter { sentence, text, build, secret }
}

impl Starter {
    /// What goes into the file of this project. In the comments only, so that another name does for it too.
    fn text(&self, project: &Label) -> String {
        self.text.replace("{project}", project.as_str())
    }

    /// The commands that make it run. The secret is the project's own: one for all would be overwritten by the next
    /// project that is begun from the same template.
    fn next(&self, project: &Label, path: &Path) -> Vec<String> {
        let build = self.build.map(str::to_owned);
        let secret = self.secret.map(|name| format!("orca secrets set {name} --project {project}"));
        build.into_iter().chain(secret).chain([deploy(path)]).collect()
    }
}

pub fn run(args: &InitArgs, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Wrote<'a> {
        file: &'a Path,
        next: &'a [String],
    }
    let Some(template) = args.template else { return list(output) };
    let starter = starter(template);
    let path = &args.file;
    let failed =
        |error: io::Error| Failure::input(format!("{} cannot be written", path.display())).why(error.to_string());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).create_new(!args.force);
    let mut file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::input(format!("{} exists already", path.display()))
            .fix("write another with --file, or replace it with --force"),
        _ => failed(error),
    })?;
    let project = files::default_name(path)?;
    file.write_all(starter.text(&project).as_bytes()).map_err(failed)?;
    let next = starter.next(&project, path);
    if output.json {
        output.object("file", &Wrote { file: path, next: &next });
        return done();
    }
    output.print(&format!("Wrote {}.\n", path.display()));
    for command in next {
        output.notice(&Text::of(Ink::Dim, "  then  ").and(Ink::Plain, command));
    }
    done()
}

/// What deploys a file, from the directory it was written from.
fn deploy(path: &Path) -> String {
    match path == Path::new("service.toml") {
        true => "orca deploy".to_owned(),
        false => format!("orca deploy -f {}", path.display()),
    }
}

fn list(output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Listed {
        templates: Vec<Row>,
    }
    #[derive(Serialize)]
    struct Row {
        name: String,
        about: &'static str,
    }
    let rows = Template::value_variants().iter().filter_map(|template| {
        let name = template.to_possible_value()?.get_name().to_owned();
        Some(Row { name, about: starter(*template).sentence })
    });
    let rows: Vec<Row> = rows.collect();
    if output.json {
        output.object("templates", &Listed { templates: rows });
        return done();
    }
    let rows = rows.into_iter().map(|row| vec![Text::plain(row.name), Text::of(Ink::Dim, row.about)]).collect();
    output.lines(&table(2, &[Side::Left, Side::Left], rows));
    output.notice(&Text::of(Ink::Dim, "Write one with `orca init NAME`."));
    done()
}

#[cfg(test)]
mod tests {
    use super::*;
    use orca_cluster::spec::toml::{SourceFile, project, render};

    #[test]
    fn the_next_step_finds_the_file() {
        assert_eq!(deploy(Path::new("service.toml")), "orca deploy");
        assert_eq!(deploy(Path::new("services/db/service.toml")), "orca deploy -f services/db/service.toml");
    }

    #[test]
    fn every_template_is_a_project() {
        for template in Template::value_variants() {
            let demo = Label::new("demo").unwrap();
            let starter = starter(*template);
            let (text, next) = (starter.text(&demo), starter.next(&demo, Path::new("service.toml")));
            assert!(!text.contains("{project}"), "{text}");
            let file = SourceFile { name: format!("{template:?}"), text: text.clone() };
            let project = project(&file, &demo).unwrap_or_else(|problems| {
                let text: String = problems.iter().map(|problem| render(problem, &text, false)).collect();
                panic!("{text}");
            });
            // Each secret it refers to is named in what to do next, as this project's own.
            for secret in project.services.values().flat_map(|service| service.secrets()) {
                let set = format!("orca secrets set {secret} --project demo");
                assert!(next.contains(&set), "{template:?} does not say to set {secret}: {next:?}");
            }
        }
    }
}
