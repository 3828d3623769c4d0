//! What requests and answers look like, for the OpenAPI document. Written down by hand and held to by a test, which
//! compares the answers of a node with it field by field: the types themselves live in crates that know nothing of
//! HTTP.
//!
//! A type is `string`, `integer`, `number`, `boolean`, `any`, the name of one below, `[a list]` or `{a map}` of one, and
//! `…?` if it may be null. A field whose name ends in `?` may be absent. Times are milliseconds since 1970.

use utoipa::openapi::schema::{AdditionalProperties, SchemaType};
use utoipa::openapi::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Ref, RefOr, Schema, Type};

enum Shape {
    Object(&'static [(&'static str, &'static str)]),
    /// One of these words.
    Words(&'static [&'static str]),
    /// One of these types.
    OneOf(&'static [&'static str]),
}

use Shape::{Object, OneOf, Words};

const SHAPES: &[(&str, Shape)] = &[
    // What is sent.
    ("Scaling", Object(&[("replicas", "integer")])),
    ("Rollback", Object(&[("to?", "integer?")])),
    ("Digests", Object(&[("digests", "[string]")])),
    ("NewToken", Object(&[("name", "string"), ("role", "Role"), ("project?", "string?"), ("expires?", "integer?")])),
    // As `orca` sends it after reading the file; people write the TOML.
    ("Project", Object(&[("name", "string"), ("services", "{any}")])),
    ("Settings", Object(&[("allow_host", "[string]")])),
    // What is answered.
    (
        "Problem",
        Object(&[
            ("title", "string"),
            ("status", "integer"),
            ("reason", "Reason"),
            ("detail", "string"),
            ("hint?", "string"),
            ("errors?", "[FileProblem]"),
        ]),
    ),
    ("Reason", Words(&["invalid", "unauthorised", "not_found", "conflict", "no_quorum", "timed_out", "failed"])),
    (
        "FileProblem",
        Object(&[
            ("file", "string"),
            ("span", "Span"),
            ("line", "integer"),
            ("column", "integer"),
            ("kind", "string"),
            ("message", "string"),
            ("hint", "string?"),
        ]),
    ),
    ("Span", Object(&[("start", "integer"), ("end", "integer")])),
    ("Health", Object(&[("status", "string")])),
    ("Changed", Object(&[("generation", "integer"), ("revision?", "integer")])),
    ("Deployed", Object(&[("generation", "integer"), ("outcome", "Outcome")])),
    ("Outcome", Object(&[("services", "{ServiceOutcome}"), ("settings?", "[string]"), ("unlisted?", "[string]")])),
    ("ServiceOutcome", OneOf(&["Created", "Replaced", "Unchanged", "Removed"])),
    ("Created", Object(&[("created", "CreatedAs")])),
    ("CreatedAs", Object(&[("revision", "integer"), ("replicas", "integer")])),
    ("Replaced", Object(&[("changed", "ReplacedBy")])),
    (
        "ReplacedBy",
        Object(&[
            ("from", "integer"),
            ("revision", "integer"),
            ("replaces", "boolean"),
            ("differences", "[string]"),
            ("stopped?", "boolean"),
        ]),
    ),
    ("Unchanged", Object(&[("unchanged", "UnchangedAt")])),
    ("UnchangedAt", Object(&[("revision", "integer"), ("rolling_out", "boolean"), ("proven", "boolean")])),
    ("Removed", Words(&["removed"])),
    (
        "Whoami",
        Object(&[
            ("name", "string"),
            ("role", "Role"),
            ("project", "string?"),
            ("cluster", "string"),
            ("cluster_id", "string"),
            ("version", "string"),
        ]),
    ),
    ("Role", Words(&["viewer", "deployer", "admin"])),
    (
        "Status",
        Object(&[
            ("cluster", "string"),
            ("cluster_id", "string"),
            ("generation", "integer"),
            ("at", "integer"),
            ("nodes", "[NodeStatus]"),
            ("services", "[ServiceStatus]"),
        ]),
    ),
    ("Nodes", Object(&[("nodes", "[NodeStatus]")])),
    (
        "NodeStatus",
        Object(&[
            ("id", "integer"),
            ("name", "string"),
            ("address", "string"),
            ("condition", "NodeCondition"),
            ("last_heard", "integer?"),
            ("replicas", "integer"),
            ("facts", "Facts?"),
        ]),
    ),
    ("NodeCondition", Words(&["alive", "suspect", "dead", "unheard"])),
    (
        "Facts",
        Object(&[
            ("host_name", "string"),
            ("architecture", "string"),
            ("kernel", "string"),
            ("cpu", "integer"),
            ("memory", "integer"),
            ("memory_available", "integer"),
            ("disk_available", "integer"),
            ("containers", "any"),
            ("proxy", "[string]"),
            ("version", "string"),
            ("labels?", "{string}"),
            ("fault?", "string"),
        ]),
    ),
    (
        "ServiceStatus",
        Object(&[
            ("name", "string"),
            ("state", "ServiceState"),
            ("source", "string"),
            ("module", "boolean"),
            ("revision", "integer"),
            ("digest", "string?"),
            ("strategy", "any"),
            ("wanted", "integer"),
            ("ready", "integer"),
            ("replicas", "[ReplicaStatus]"),
            ("routes", "[string]"),
            ("schedules?", "{any}"),
            ("rollout", "RolloutStatus?"),
            ("waiting", "[any]"),
            ("why", "Diagnosis?"),
            ("recent", "Window"),
            ("last_receipt", "Receipt?"),
        ]),
    ),
    (
        "ServiceState",
        Words(&[
            "running",
            "starting",
            "updating",
            "rolling-back",
            "canary",
            "degraded",
            "failing",
            "crash-looping",
            "stopped",
            "removing",
        ]),
    ),
    (
        "ReplicaStatus",
        Object(&[
            ("id", "integer"),
            ("node", "integer"),
            ("node_name", "string"),
            ("revision", "integer"),
            ("phase", "Phase"),
            ("leaving", "boolean"),
            ("since", "integer"),
            ("placed", "integer"),
            ("address", "string?"),
            ("restarts", "integer"),
            ("failures", "integer"),
            ("last_exit", "Exit?"),
            ("trouble", "Trouble?"),
            ("usage", "Usage"),
            ("in_flight", "InFlight"),
            ("pulled", "Pulled?"),
            ("pulling?", "Pulling?"),
            ("ready_after_ms", "integer?"),
        ]),
    ),
    (
        "Phase",
        Words(&[
            "pending", "pulling", "creating", "starting", "ready", "unready", "back_off", "stopping", "gone", "unknown",
        ]),
    ),
    (
        "Exit",
        Object(&[
            ("at", "integer"),
            ("code", "integer"),
            ("out_of_memory", "boolean"),
            ("after_ms", "integer"),
            ("last_lines", "[string]"),
            ("ending", "any"),
        ]),
    ),
    ("Trouble", Object(&[("at", "integer"), ("cause", "any"), ("retry_at", "integer?")])),
    ("Usage", Object(&[("memory", "integer"), ("cpu", "integer")])),
    ("InFlight", Object(&[("requests", "integer"), ("upgraded", "integer")])),
    ("Pulled", Object(&[("bytes", "integer"), ("millis", "integer")])),
    ("Pulling", Object(&[("bytes", "integer"), ("total", "integer?")])),
    (
        "RolloutStatus",
        Object(&[
            ("to", "integer"),
            ("from", "integer?"),
            ("started", "integer"),
            ("back", "boolean"),
            ("because", "string?"),
            ("ready_timeout_secs", "integer"),
        ]),
    ),
    (
        "Diagnosis",
        Object(&[
            ("code", "string"),
            ("cause", "string"),
            ("evidence", "[string]"),
            ("fix", "string?"),
            ("replica", "integer?"),
        ]),
    ),
    (
        "Window",
        Object(&[
            ("from", "integer"),
            ("to", "integer"),
            ("requests", "integer"),
            ("errors", "integer"),
            ("cut", "integer"),
            ("p99_us", "integer?"),
            ("unserved?", "integer"),
            ("at_least?", "boolean"),
        ]),
    ),
    (
        "Receipt",
        Object(&[
            ("revision", "integer"),
            ("from", "integer?"),
            ("outcome", "RolloutOutcome"),
            ("started", "integer"),
            ("ended", "integer"),
            ("replaced", "integer"),
            ("before", "Window"),
            ("during", "Window"),
            ("after", "Window?"),
            ("failure", "Failure?"),
        ]),
    ),
    ("RolloutOutcome", Words(&["done", "rolled_back", "failed"])),
    ("Failure", Object(&[("cause", "string"), ("evidence", "[string]"), ("fix", "string?"), ("asked", "boolean")])),
    ("Why", Object(&[("service", "ServiceStatus"), ("diagnosis", "Diagnosis?")])),
    ("History", Object(&[("service", "string"), ("revisions", "[RevisionInfo]"), ("receipts", "[Receipt]")])),
    (
        "RevisionInfo",
        Object(&[
            ("revision", "integer"),
            ("at", "integer"),
            ("by", "string"),
            ("note", "string"),
            ("source", "string"),
            ("digest", "string?"),
            ("replicas", "integer"),
            ("is_target", "boolean"),
            ("is_settled", "boolean"),
        ]),
    ),
    (
        "Progress",
        Object(&[("generation", "integer"), ("at", "integer"), ("services", "[ServiceStatus]"), ("events", "[Event]")]),
    ),
    (
        "Event",
        Object(&[
            ("index", "[integer]"),
            ("at", "integer"),
            ("actor", "any"),
            ("source", "string?"),
            ("kind", "string"),
            ("service", "string?"),
            ("replica?", "integer"),
            ("text", "string"),
        ]),
    ),
    (
        "LogLine",
        Object(&[
            ("at", "integer"),
            ("replica", "integer"),
            ("node", "integer"),
            ("stream", "LogStream"),
            ("text", "string"),
        ]),
    ),
    ("LogStream", Words(&["stdout", "stderr"])),
    ("Secrets", Object(&[("secrets", "[SecretInfo]")])),
    (
        "SecretInfo",
        Object(&[
            ("name", "string"),
            ("version", "integer"),
            ("at", "integer"),
            ("by", "string"),
            ("used_by", "[string]"),
        ]),
    ),
    ("Token", Object(&[("id", "string"), ("text", "string")])),
    ("Tokens", Object(&[("tokens", "[TokenInfo]")])),
    (
        "TokenInfo",
        Object(&[
            ("id", "string"),
            ("name", "string"),
            ("role", "Role"),
            ("project", "string?"),
            ("created", "integer"),
            ("expires", "integer?"),
        ]),
    ),
    ("Findings", Object(&[("findings", "[Finding]")])),
    (
        "Finding",
        Object(&[
            ("subject", "string"),
            ("ok", "boolean"),
            ("message", "string"),
            ("fix", "string?"),
            ("details", "{integer}"),
        ]),
    ),
];

/// Every type that has a name.
pub fn named() -> impl Iterator<Item = (&'static str, RefOr<Schema>)> {
    SHAPES.iter().map(|(name, shape)| (*name, of_shape(shape)))
}

fn of_shape(shape: &Shape) -> RefOr<Schema> {
    match shape {
        Object(fields) => {
            let object = fields.iter().fold(ObjectBuilder::new().schema_type(Type::Object), |object, (name, of)| {
                match name.strip_suffix('?') {
                    Some(name) => object.property(name, of_type(of)),
                    None => object.property(*name, of_type(of)).required(*name),
                }
            });
            RefOr::T(Schema::Object(object.build()))
        }
        Words(words) => {
            let object = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words.iter().copied()));
            RefOr::T(Schema::Object(object.build()))
        }
        OneOf(types) => {
            let one_of = types.iter().fold(OneOfBuilder::new(), |one_of, name| one_of.item(of_type(name)));
            RefOr::T(Schema::OneOf(one_of.build()))
        }
    }
}

/// What a type's text means.
pub fn of_type(text: &str) -> RefOr<Schema> {
    let plain = |of: SchemaType| RefOr::T(Schema::Object(ObjectBuilder::new().schema_type(of).build()));
    if let Some(item) = text.strip_suffix('?') {
        let null = plain(Type::Null.into());
        return RefOr::T(Schema::OneOf(OneOfBuilder::new().item(of_type(item)).item(null).build()));
    }
    if let Some(item) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return RefOr::T(Schema::Array(ArrayBuilder::new().items(of_type(item)).build()));
    }
    if let Some(item) = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        let map = ObjectBuilder::new().schema_type(Type::Object);
        let map = map.additional_properties(Some(AdditionalProperties::RefOr(of_type(item))));
        return RefOr::T(Schema::Object(map.build()));
    }
    match text {
        "string" => plain(Type::String.into()),
        "integer" => plain(Type::Integer.into()),
        "number" => plain(Type::Number.into()),
        "boolean" => plain(Type::Boolean.into()),
        "any" => plain(SchemaType::AnyValue),
        name => RefOr::Ref(Ref::from_schema_name(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_is_used_is_there() {
        let text = serde_json::to_string(&named().collect::<std::collections::BTreeMap<_, _>>()).unwrap();
        for part in text.split("#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap_or_default();
            assert!(SHAPES.iter().any(|(known, _)| *known == name), "{name}");
        }
    }
}
