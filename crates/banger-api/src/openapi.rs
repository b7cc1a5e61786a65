//! The OpenAPI 3.1 document, assembled from the endpoints themselves.

use crate::endpoint::{Endpoint, Style, Visitor, for_each};
use crate::error::ErrorBody;
use crate::version::VERSION;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

struct Builder {
    requests: SchemaGenerator,
    replies: SchemaGenerator,
    paths: Map<String, Value>,
}

/// The whole document.
pub fn document() -> Value {
    let settings = || {
        SchemaSettings::draft2020_12().with(|s| s.definitions_path = "/components/schemas".into())
    };
    let mut builder = Builder {
        requests: settings().for_deserialize().into_generator(),
        replies: settings().for_serialize().into_generator(),
        paths: Map::new(),
    };
    for_each(&mut builder);
    let error = builder.replies.subschema_for::<ErrorBody>();
    let mut schemas = builder.requests.take_definitions(true);
    schemas.extend(builder.replies.take_definitions(true));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "banger",
            "version": VERSION,
            "description": "HTTP and JSON over the daemon's Unix socket. Every reply carries `banger-version` and `banger-build`.",
        },
        "paths": builder.paths,
        "components": {
            "schemas": schemas,
            "responses": { "Error": { "description": "Refused or failed", "content": { "application/json": { "schema": error } } } },
        },
    })
}

impl Visitor for Builder {
    fn visit<E: Endpoint>(&mut self) {
        let request = self.requests.subschema_for::<E::Request>();
        let reply = self.replies.subschema_for::<E::Reply>();
        let mut parameters: Vec<Value> = E::PATH
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        let mut item = json!({ "operationId": E::NAME, "summary": E::SUMMARY });
        if matches!(E::METHOD, "GET" | "DELETE") {
            parameters.extend(self.query_parameters::<E>());
        } else {
            item["requestBody"] =
                json!({ "content": { "application/json": { "schema": request } } });
        }
        if !parameters.is_empty() {
            item["parameters"] = parameters.into();
        }
        let (status, content) = match E::STYLE {
            Style::Json => ("200", Some("application/json")),
            Style::JsonLines => ("200", Some("application/jsonl")),
            Style::Bytes => ("200", Some("application/octet-stream")),
            Style::Upgrade => ("101", None),
        };
        let mut response = json!({ "description": E::SUMMARY });
        if let Some(content) = content {
            let schema = if E::STYLE == Style::Bytes {
                json!({})
            } else {
                json!(reply)
            };
            response["content"] = json!({ content: { "schema": schema } });
        }
        item["responses"] =
            json!({ status: response, "default": { "$ref": "#/components/responses/Error" } });
        let path = self.paths.entry(E::PATH).or_insert_with(|| json!({}));
        path[E::METHOD.to_ascii_lowercase()] = item;
    }
}

impl Builder {
    /// The members of the request as query parameters.
    fn query_parameters<E: Endpoint>(&mut self) -> Vec<Value> {
        let schema = json!(self.requests.root_schema_for::<E::Request>());
        let members = schema["properties"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        members
            .into_iter()
            .map(|(name, mut schema)| {
                let description = schema.as_object_mut().and_then(|schema| schema.remove("description"));
                let required = required.contains(&Value::from(name.clone()));
                json!({"name": name, "in": "query", "required": required, "description": description.unwrap_or_default(), "schema": schema})
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let current = format!("{:#}\n", document());
        if std::env::var_os("BANGER_UPDATE_OPENAPI").is_some() {
            std::fs::write(path, &current).unwrap();
        }
        let stored = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            stored == current,
            "openapi.json is stale: run the tests once with BANGER_UPDATE_OPENAPI=1"
        );
    }
}
