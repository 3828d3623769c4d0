//! The OpenAPI document, made from the routes.

use utoipa::openapi::path::{OperationBuilder, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Content, InfoBuilder, Object, OpenApi, OpenApiBuilder, PathItem, PathsBuilder, Required,
    ResponseBuilder, Type,
};

use super::route::{Route, routes};
use super::schema;

const DESCRIPTION: &str = "The cluster's HTTP API: what the command line asks of a cluster, except for running a command \
in a replica (`orca exec`), which needs a stream both ways. Errors are problem+json.";

/// The OpenAPI document of [`routes`].
pub fn document() -> OpenApi {
    let info = InfoBuilder::new().title("Orca").version(env!("CARGO_PKG_VERSION")).description(Some(DESCRIPTION));
    let paths = routes().into_iter().fold(PathsBuilder::new(), |paths, route| {
        let path = route.path;
        paths.path(path, PathItem::new(route.method.clone(), operation(route)))
    });
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    let components = ComponentsBuilder::new().security_scheme("token", bearer);
    let components = schema::named().fold(components, |all, (name, schema)| all.schema(name, schema));
    OpenApiBuilder::new().info(info.build()).paths(paths).components(Some(components.build())).build()
}

fn operation(route: Route) -> utoipa::openapi::path::Operation {
    let in_path = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = in_path.map(|name| parameter(name, ParameterIn::Path, None));
    let in_query = route.query.iter().map(|(name, description)| parameter(name, ParameterIn::Query, Some(description)));
    let content = |of| Content::new(Some(schema::of_type(of)));
    let body = route.body.map(|description| {
        let body = RequestBodyBuilder::new().description(Some(description));
        route.sent.iter().fold(body, |body, (media, what)| body.content(*media, content(what))).build()
    });
    let done = ResponseBuilder::new().description("done").content(route.answer.0, content(route.answer.1));
    let problem = ResponseBuilder::new().description("refused");
    let problem = problem.content("application/problem+json", content("Problem"));
    let security = if route.open { vec![] } else { vec![SecurityRequirement::new("token", [] as [&str; 0])] };
    OperationBuilder::new()
        .summary(Some(route.summary))
        .parameters(Some(in_path.chain(in_query).collect::<Vec<_>>()))
        .request_body(body)
        .response("200", done.build())
        .response("default", problem.build())
        .securities(Some(security))
        .build()
}

fn parameter(name: &str, place: ParameterIn, description: Option<&str>) -> Parameter {
    let required = if matches!(place, ParameterIn::Path) { Required::True } else { Required::False };
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(required)
        .description(description)
        .schema(Some(Object::with_type(Type::String)))
        .build()
}
