//! `init`: a file to start from. Every template is parsed by a test, so none can be out of date.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::ValueEnum as _;
use serde::Serialize;

use super::done;
use crate::cli::{InitArgs, Template};
use crate::exit::Failure;
use crate::output::Output;
use crate::output::text::{Ink, Side, Text, table};

/// What a template is, and what to do once it is written.
struct Starter {
    sentence: &'static str,
    text: &'static str,
    next: &'static [&'static str],
}

fn starter(template: Template) -> Starter {
    let (sentence, text, next): (_, _, &'static [&'static str]) = match template {
        Template::Web => ("an HTTP service from an image", include_str!("init/web.toml"), &[]),
        Template::Wasm => (
            "an HTTP service from a Wasm component",
            include_str!("init/wasm.toml"),
            &["cargo build --release --target wasm32-wasip2"],
        ),
        Template::Static => ("a static site, served by nginx from an image", include_str!("init/static.toml"), &[]),
        Template::Worker => ("a process without a port", include_str!("init/worker.toml"), &[]),
        Template::Postgres => {
            ("PostgreSQL with a volume", include_str!("init/postgres.toml"), &["orca secrets set POSTGRES_PASSWORD"])
        }
        Template::Redis => ("Redis with a volume", include_str!("init/redis.toml"), &[]),
        Template::Wordpress => {
            ("WordPress with MariaDB", include_str!("init/wordpress.toml"), &["orca secrets set WORDPRESS_DB_PASSWORD"])
        }
        Template::N8n => {
            ("n8n, workflow automation", include_str!("init/n8n.toml"), &["orca secrets set N8N_ENCRYPTION_KEY"])
        }
    };
    Starter { sentence, text, next }
}

pub fn run(args: &InitArgs, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Wrote<'a> {
        file: &'a Path,
        next: &'a [String],
    }
    let Some(template) = args.template else { return list(output) };
    let Starter { text, next, .. } = starter(template);
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
    file.write_all(text.as_bytes()).map_err(failed)?;
    let next: Vec<String> = next.iter().map(|command| (*command).to_owned()).chain([deploy(path)]).collect();
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
    use orca_cluster::id::Label;
    use orca_cluster::spec::toml::{SourceFile, project, render};

    #[test]
    fn the_next_step_finds_the_file() {
        assert_eq!(deploy(Path::new("service.toml")), "orca deploy");
        assert_eq!(deploy(Path::new("services/db/service.toml")), "orca deploy -f services/db/service.toml");
    }

    #[test]
    fn every_template_is_a_project() {
        for template in Template::value_variants() {
            let Starter { text, next, .. } = starter(*template);
            let file = SourceFile { name: format!("{template:?}"), text: text.to_owned() };
            let project = project(&file, &Label::new("demo").unwrap()).unwrap_or_else(|problems| {
                let text: String = problems.iter().map(|problem| render(problem, text, false)).collect();
                panic!("{text}");
            });
            // Each secret it refers to is named in what to do next.
            for secret in project.services.values().flat_map(|service| service.secrets()) {
                assert!(
                    next.iter().any(|command| command.contains(secret)),
                    "{template:?} does not say to set {secret}"
                );
            }
        }
    }
}
