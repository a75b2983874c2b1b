//! `/openapi.json`: an OpenAPI 3.1 document of all routes, with schemas made from the types that read bodies and write
//! answers. `/docs` shows it.

use std::sync::LazyLock;

use axum::{
    Json,
    response::{Html, IntoResponse, Response},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{adapters, error, info, lorax, openai};

/// A page that shows the document.
const PAGE: &str = include_str!("openapi/page.html");

/// `GET /openapi.json`, `GET /api-doc/openapi.json`
pub(crate) async fn document() -> Response {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(make);
    Json(&*DOCUMENT).into_response()
}

/// `GET /docs`
pub(crate) async fn page() -> Html<&'static str> {
    Html(PAGE)
}

/// The way to the schema of a type.
type ToSchema = fn(&mut SchemaGenerator) -> Schema;

fn of<T: JsonSchema>() -> Option<ToSchema> {
    Some(|generator| generator.subschema_for::<T>())
}

/// A route.
struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    body: Option<ToSchema>,
    answer: Answer,
    /// Whether the answer may also be a stream of events.
    streams: bool,
}

/// What stands in the body of an answer.
#[derive(Clone, Copy)]
enum Answer {
    /// Nothing: the status says all.
    Empty,
    /// JSON whose type is not described.
    Json,
    Of(ToSchema),
}

const fn get(path: &'static str, summary: &'static str) -> Operation {
    Operation { method: "get", path, summary, body: None, answer: Answer::Json, streams: false }
}

/// A route that probes ask.
const fn probe(path: &'static str, summary: &'static str) -> Operation {
    Operation { answer: Answer::Empty, ..get(path, summary) }
}

fn post<T: JsonSchema>(path: &'static str, summary: &'static str) -> Operation {
    Operation { method: "post", body: of::<T>(), ..get(path, summary) }
}

impl Operation {
    fn answers<T: JsonSchema>(self) -> Operation {
        Operation { answer: Answer::Of(|generator| generator.subschema_for::<T>()), ..self }
    }

    fn streams(self) -> Operation {
        Operation { streams: true, ..self }
    }
}

/// All routes of `App::routes`; a test compares them.
fn operations() -> Vec<Operation> {
    use adapters::{AibrixLoad, AibrixUnload, RegisterRequest, VllmLoad, VllmUnload};
    use lorax::{Generate, GenerateResponse, StreamEvent, tokenize};
    vec![
        probe("/", "Whether the model can answer"),
        post::<Generate>("/", "Generate, whole or streamed").answers::<Vec<GenerateResponse>>().streams(),
        post::<Generate>("/invocations", "The same, for SageMaker")
            .answers::<Vec<GenerateResponse>>()
            .streams(),
        post::<Generate>("/generate", "Generate an answer").answers::<GenerateResponse>(),
        post::<Generate>("/generate_stream", "Generate an answer as events").answers::<StreamEvent>(),
        post::<lorax::EmbedRequest>("/embed", "The vector of a text"),
        post::<lorax::ClassifyRequest<String>>("/classify", "The entities or classes of a text"),
        post::<lorax::ClassifyRequest<Vec<String>>>("/classify_batch", "The same of several texts"),
        probe("/health", "Whether the model can answer"),
        post::<tokenize::TokenizeRequest>("/tokenize", "The tokens of a text")
            .answers::<tokenize::Tokenized>(),
        post::<tokenize::DetokenizeRequest>("/detokenize", "The text of tokens")
            .answers::<tokenize::Detokenized>(),
        probe("/ping", "Whether the model can answer"),
        probe("/startup", "Whether the model could answer yet"),
        probe("/livez", "Whether the process works"),
        probe("/readyz", "Whether the model can answer"),
        probe("/startupz", "Whether the model could answer yet"),
        get("/info", "The model, the limits, the device").answers::<info::InfoResponse<'static>>(),
        get("/metrics", "Metrics in Prometheus' text format"),
        get("/openapi.json", "This document"),
        get("/api-doc/openapi.json", "This document"),
        get("/docs", "This document as a page"),
        get("/v1/models", "The base model and registered adapters").answers::<info::ModelList>(),
        get("/v1/models/{id}", "One of them").answers::<info::Model>(),
        get("/v1/adapters", "Adapters that are registered or were named lately"),
        post::<RegisterRequest>("/v1/adapters", "Register an adapter"),
        get("/v1/adapters/capacity", "What each tier holds and may hold"),
        get("/v1/adapters/{id}", "One registered adapter"),
        Operation { method: "delete", ..get("/v1/adapters/{id}", "End a registration") },
        post::<VllmLoad>("/v1/load_lora_adapter", "Register an adapter as vLLM does"),
        post::<VllmUnload>("/v1/unload_lora_adapter", "End a registration as vLLM does"),
        post::<AibrixLoad>("/v1/lora_adapter/load", "Register an adapter as AIBrix does"),
        post::<AibrixUnload>("/v1/lora_adapter/unload", "End a registration as AIBrix does"),
        post::<openai::EmbeddingsRequest>("/v1/embeddings", "Vectors as OpenAI has them"),
        post::<openai::CompletionRequest>("/v1/completions", "Completions as OpenAI has them").streams(),
        post::<openai::ChatRequest>("/v1/chat/completions", "Chats as OpenAI has them").streams(),
        post::<openai::ResponsesRequest>("/v1/responses", "Responses as OpenAI has them").streams(),
    ]
}

/// An event of a stream, whose data is the text of something with a schema.
fn event_of(schema: &Value) -> Value {
    let data = json!({"type": "string", "contentMediaType": "application/json", "contentSchema": schema});
    json!({"type": "object", "properties": {"data": data}})
}

/// What makes the schemas of bodies, and those of answers: a field that may be left out of the one need not be left out of
/// the other.
struct Generators {
    bodies: SchemaGenerator,
    answers: SchemaGenerator,
}

impl Generators {
    fn new() -> Generators {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        Generators {
            bodies: settings.clone().for_deserialize().into_generator(),
            answers: settings.for_serialize().into_generator(),
        }
    }

    fn definitions(mut self) -> Map<String, Value> {
        let mut all = self.bodies.take_definitions(true);
        all.extend(self.answers.take_definitions(true));
        all
    }
}

fn make() -> Value {
    let mut generators = Generators::new();
    let error = generators.answers.subschema_for::<error::ErrorBody>();
    let mut paths = Map::new();
    for operation in operations() {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = operation.describe(&mut generators, &error);
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "lorax", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {
            "schemas": generators.definitions(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    })
}

impl Operation {
    fn describe(&self, generators: &mut Generators, error: &Schema) -> Value {
        let schema = match self.answer {
            Answer::Of(schema) => schema(&mut generators.answers).to_value(),
            Answer::Empty | Answer::Json => json!({}),
        };
        let mut content = match self.path {
            "/metrics" => json!({"text/plain": {"schema": {"type": "string"}}}),
            "/docs" => json!({"text/html": {"schema": {"type": "string"}}}),
            "/generate_stream" => json!({"text/event-stream": {"schema": event_of(&schema)}}),
            _ if matches!(self.answer, Answer::Empty) => json!({}),
            _ => json!({"application/json": {"schema": schema}}),
        };
        if self.streams {
            content["text/event-stream"] = json!({});
        }
        let mut all = json!({
            "summary": self.summary,
            "operationId": format!("{}{}", self.method, self.path.replace(['/', '{', '}', '.'], "_")),
            "responses": {
                "200": {"description": "The answer", "content": content},
                "default": {"description": "An error", "content": {"application/json": {"schema": error}}},
            },
        });
        if let Some(body) = self.body {
            let schema = body(&mut generators.bodies);
            all["requestBody"] =
                json!({"required": true, "content": {"application/json": {"schema": schema}}});
        }
        if self.path.contains("{id}") {
            let id = json!({"name": "id", "in": "path", "required": true, "schema": {"type": "string"}});
            all["parameters"] = json!([id]);
        }
        all
    }
}
