//! Vectors and classes: what is asked of the shard, and what is made of its answers.

use std::{fs, path::Path};

use base64::{Engine, prelude::BASE64_STANDARD};
use lifecycle::Supervisor;
use lorax_router::App;
use proto::{Task, pooling::Kind};
use serde_json::{Value, json};

use crate::{
    router::{Router, configuration, model, tokens},
    shard::Script,
};

/// A shard of a model with a task.
pub(crate) fn pooling(task: Task) -> Script {
    let mut script = Script::saying(tokens("a"));
    script.info.task = task.into();
    let labels = if task == Task::Embed { &[][..] } else { &LABELS };
    script.info.labels = labels.iter().map(|label| (*label).to_owned()).collect();
    (script.info.hidden_size, script.info.bidirectional) = (4, true);
    script
}

const LABELS: [&str; 3] = ["O", "B-X", "I-X"];

/// The folder of the tokenizer, with files of sentence-transformers.
fn sentence_transformer(modules: &Value, pooling: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    write("tokenizer.json", &fs::read(model().join("tokenizer.json")).unwrap());
    write("modules.json", modules.to_string().as_bytes());
    write("1_Pooling/config.json", pooling.to_string().as_bytes());
    write("sentence_bert_config.json", br#"{"max_seq_length": 6, "do_lower_case": true}"#);
    folder
}

fn module(path: &str, kind: &str) -> Value {
    json!({"idx": 0, "name": "0", "path": path, "type": format!("sentence_transformers.models.{kind}")})
}

async fn start(script: Script, folder: &Path) -> Router {
    let folder = folder.to_owned();
    Router::start_with(script, move |config| config.model.path = folder).await
}

#[tokio::test]
async fn files_say_how_texts_are_pooled() {
    for (mode, kind) in [("cls_token", Kind::First), ("mean_tokens", Kind::Mean), ("lasttoken", Kind::Last)] {
        for normalize in [false, true] {
            let mut modules = vec![module("", "Transformer"), module("1_Pooling", "Pooling")];
            modules.extend(normalize.then(|| module("2_Normalize", "Normalize")));
            let mut config = json!({"pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": false});
            config[format!("pooling_mode_{mode}")] = json!(true);
            let folder = sentence_transformer(&json!(modules), &config);
            let router = start(pooling(Task::Embed), folder.path()).await;
            let answer = router.ok("/embed", &json!({"inputs": "  Hello or NOT  "})).await;
            let ids = tokens("hello or not");
            let ids = &ids[..ids.len().min(6)];
            let vector =
                json!([ids[0] as f32, ids[ids.len() - 1] as f32, ids.len() as f32, f32::from(normalize)]);
            assert_eq!(answer, json!({"embeddings": vector}), "{mode}");
            let asked = router.shard.saw(|seen| seen.added().next().cloned()).await;
            let pooling = asked.pooling.unwrap();
            assert_eq!((pooling.kind(), pooling.normalize, pooling.classes), (kind, normalize, false));
            assert_eq!(asked.tokens, ids, "{mode}: stripped, in lower case, truncated to 6 tokens");
        }
    }
}

/// The mean is on unless a file says that it is off, so that another mode beside it would be two.
#[tokio::test]
async fn the_mean_is_taken_where_nothing_is_said_of_it() {
    let modules = json!([module("", "Transformer"), module("1_Pooling", "Pooling")]);
    for config in [json!({}), json!({"pooling_mode_max_tokens": false}), json!({"pooling_mode": "mean"})] {
        let folder = sentence_transformer(&modules, &config);
        let router = start(pooling(Task::Embed), folder.path()).await;
        router.ok("/embed", &json!({"inputs": "Hello"})).await;
        let asked = router.shard.saw(|seen| seen.added().next().cloned()).await;
        assert_eq!(asked.pooling.unwrap().kind(), Kind::Mean, "{config}");
    }
    for mode in ["cls_token", "lasttoken", "max_tokens"] {
        let folder = sentence_transformer(&modules, &json!({format!("pooling_mode_{mode}"): true}));
        let mut config = configuration("/no/such/socket".as_ref());
        config.model.path = folder.path().to_owned();
        let error = App::start(config, &Supervisor::reporting_to(drop).unwrap()).err().unwrap();
        assert!(error.to_string().contains("mean_tokens"), "{error}");
    }
}

/// Without such files: the first token, as LoRAX has it, and nothing is truncated in silence.
#[tokio::test]
async fn a_bare_encoder_gives_its_first_token() {
    let mut script = pooling(Task::Embed);
    script.info.max_positions = 8;
    let router = Router::start(script).await;
    router.ok("/embed", &json!({"inputs": " Hello", "parameters": null, "stream": false})).await;
    let asked = router.shard.saw(|seen| seen.added().next().cloned()).await;
    let pooling = asked.pooling.unwrap();
    assert_eq!((pooling.kind(), pooling.normalize), (Kind::First, false));
    assert_eq!(asked.tokens, tokens(" Hello"));
    let long = "one two three ".repeat(9);
    let (status, answer) = router.post("/v1/embeddings", &json!({"input": long})).await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (400, &json!("context_length_exceeded")),
        "{answer}"
    );
    assert!(answer["error"]["message"].as_str().unwrap().contains("maximum context length is 8 tokens"));
    let cut = router.ok("/v1/embeddings", &json!({"input": long, "truncate": true})).await;
    assert_eq!(cut["usage"]["prompt_tokens"], 8);
}

#[tokio::test]
async fn many_inputs_keep_their_order() {
    let router = Router::start(pooling(Task::Embed)).await;
    let lists: Vec<Vec<u32>> = (0..300).map(|i| vec![5 + i % 90; 1 + i as usize % 7]).collect();
    let answer = router.ok("/v1/embeddings", &json!({"input": lists, "dimensions": 3})).await;
    let data = answer["data"].as_array().unwrap();
    assert_eq!(data.len(), lists.len());
    for (index, (item, ids)) in data.iter().zip(&lists).enumerate() {
        let vector = json!([ids[0] as f32, ids[0] as f32, ids.len() as f32]);
        assert_eq!(*item, json!({"object": "embedding", "index": index, "embedding": vector}));
    }
    router.holds(0).await;
}

#[tokio::test]
async fn adapters_are_leased_for_all_inputs() {
    let router = Router::start(pooling(Task::Embed)).await;
    router.ok("/v1/embeddings", &json!({"input": ["a", "b", "c"], "model": "sql"})).await;
    router.ok("/embed", &json!({"inputs": "a", "parameters": {"adapter_id": "sql"}})).await;
    let members =
        router.shard.saw(|seen| Some(seen.added().map(|new| new.members.len()).collect::<Vec<_>>())).await;
    assert_eq!(members, [1; 4]);
}

/// Tokens whose classes follow each other are one entity, with places in characters.
#[tokio::test]
async fn classes_of_tokens_become_entities() {
    let router = Router::start(pooling(Task::ClassifyTokens)).await;
    let texts = ["Hello or not", "é one two", "the License of the Ångström", "a"];
    let all = router.ok("/classify_batch", &json!({"inputs": texts})).await;
    for (text, entities) in texts.iter().zip(all.as_array().unwrap()) {
        assert_eq!(router.ok("/classify", &json!({"inputs": text})).await, *entities, "{text}");
        let outside = tokens(text).iter().filter(|id| **id % 3 == 0).count();
        let begins = tokens(text).iter().filter(|id| **id % 3 == 1).count();
        let count = entities.as_array().unwrap().len();
        assert!(count >= begins && count <= tokens(text).len() - outside, "{text}: {entities}");
        for entity in entities.as_array().unwrap() {
            assert_eq!((&entity["entity_group"], &entity["score"]), (&json!("X"), &json!(0.75)), "{text}");
            let [start, end] = ["start", "end"].map(|place| entity[place].as_u64().unwrap() as usize);
            let part: String = text.chars().skip(start).take(end - start).collect();
            let word = entity["word"].as_str().unwrap();
            // An entity that ends within a character has no text for what it has of it.
            assert!(word.trim() == part.trim() || word.contains('\u{fffd}'), "{text}: {entity}");
        }
    }
}

#[tokio::test]
async fn classes_of_a_text_come_by_their_scores() {
    let router = Router::start(pooling(Task::ClassifySequences)).await;
    let first = tokens("é one")[0] as usize % 3;
    let classes = router.ok("/classify", &json!({"inputs": "é one"})).await;
    let names: Vec<&str> =
        classes.as_array().unwrap().iter().map(|class| class["entity_group"].as_str().unwrap()).collect();
    assert_eq!((names.len(), names[0]), (3, LABELS[first]));
    let expected =
        json!({"entity_group": LABELS[first], "score": 0.75, "word": "é one", "start": 0, "end": 5});
    assert_eq!(classes[0], expected);
    let response = router.send("/classify", &json!({"inputs": "a"})).await;
    for name in ["x-compute-type", "x-compute-time", "x-validation-time", "x-queue-time", "x-inference-time"]
    {
        assert!(response.headers().contains_key(name), "{name}");
    }
}

/// What is refused on the routes of classes and vectors, with words of the reason.
#[tokio::test]
async fn texts_that_are_refused() {
    let script = |task| {
        let mut script = pooling(task);
        script.info.max_positions = 8;
        script.not_numbers.insert(tokens("x")[0]);
        script
    };
    let long = "one two three ".repeat(9);
    let classify = [
        ("/classify", json!({"inputs": ""}), 422, "inputs"),
        ("/classify", json!({"inputs": ["a"]}), 422, "inputs"),
        ("/classify", json!({"inputs": null}), 422, "inputs"),
        ("/classify", json!({}), 422, "inputs"),
        ("/classify", json!({"inputs": long}), 422, "8"),
        ("/classify", json!({"inputs": "a", "top_k": 3}), 422, "top_k"),
        ("/classify", json!({"inputs": "a", "stream": true}), 422, "stream"),
        ("/classify", json!({"inputs": "a", "parameters": {"adapter_id": "none"}}), 404, "none"),
        ("/classify", json!({"inputs": "x"}), 424, "not numbers"),
        ("/classify_batch", json!({"inputs": []}), 422, "inputs"),
        ("/classify_batch", json!({"inputs": "a"}), 422, "inputs"),
        ("/classify_batch", json!({"inputs": ["a", ""]}), 422, "inputs"),
        ("/classify_batch", json!({"inputs": ["a", 3]}), 422, "inputs"),
        ("/classify_batch", json!({"inputs": ["a", long]}), 422, "8"),
        ("/classify_batch", json!({"inputs": vec!["a"; 10_000]}), 422, "2048"),
        ("/classify_batch", json!({"inputs": ["a", "x", "b"]}), 424, "not numbers"),
    ];
    let embed = [
        ("/embed", json!({"inputs": "x"}), 424, "not numbers"),
        ("/embed", json!({"inputs": long}), 422, "8"),
        ("/embed", json!({"inputs": [5, 6]}), 422, "inputs"),
        ("/v1/embeddings", json!({"input": "x"}), 424, "not numbers"),
        ("/v1/embeddings", json!({"input": "x", "encoding_format": "base64"}), 424, "not numbers"),
        ("/v1/embeddings", json!({"input": ["a", "x"], "dimensions": 2}), 424, "not numbers"),
        ("/v1/embeddings", json!({"input": vec!["a"; 10_000]}), 400, "2048"),
        ("/v1/embeddings", json!({"input": [5, 400]}), 400, "400"),
        ("/v1/embeddings", json!({"input": [[5], [6, -1]]}), 400, "input"),
        ("/v1/embeddings", json!({"input": [[5], []]}), 400, "input[1]"),
        ("/v1/embeddings", json!({"input": ["a", [5]]}), 400, "input"),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 5}), 400, "dimensions"),
        ("/v1/embeddings", json!({"input": "a", "model": "dummy2"}), 404, "dummy2"),
    ];
    for (task, cases) in
        [(Task::ClassifyTokens, &classify[..]), (Task::ClassifySequences, &classify), (Task::Embed, &embed)]
    {
        let router = Router::start(script(task)).await;
        for (path, body, expected, words) in cases {
            let (status, answer) = router.post(path, body).await;
            assert_eq!(status, *expected, "{path} {words}: {answer}");
            let answer = answer.to_string();
            assert!(answer.contains(words) && !answer.contains("null,null"), "{path} {words}: {answer}");
            router.holds(0).await;
        }
        // One bad text harms no others.
        match task {
            Task::Embed => router.ok("/embed", &json!({"inputs": "a"})).await,
            _ => router.ok("/classify_batch", &json!({"inputs": ["a", "b"]})).await,
        };
    }
}

/// The formats are the same numbers, and short vectors have the length 1 again where the model's have.
#[tokio::test]
async fn formats_are_equal() {
    let modules =
        json!([module("", "Transformer"), module("1_Pooling", "Pooling"), module("2", "Normalize")]);
    let folder = sentence_transformer(&modules, &json!({"pooling_mode_mean_tokens": true}));
    let normalizing = start(pooling(Task::Embed), folder.path()).await;
    let plain = Router::start(pooling(Task::Embed)).await;
    for (router, normalizes) in [(&normalizing, true), (&plain, false)] {
        for input in [json!("Hello"), json!("é"), json!([7, 9]), json!(["a", "bc"]), json!([[7], [8, 9, 10]])]
        {
            let whole = router.ok("/v1/embeddings", &json!({"input": input})).await;
            for dimensions in 1..=4 {
                let body = json!({"input": input, "dimensions": dimensions, "encoding_format": "float"});
                let floats = router.ok("/v1/embeddings", &body).await;
                let body = json!({"input": input, "dimensions": dimensions, "encoding_format": "base64"});
                let coded = router.ok("/v1/embeddings", &body).await;
                for (i, item) in floats["data"].as_array().unwrap().iter().enumerate() {
                    let vector: Vec<f32> = serde_json::from_value(item["embedding"].clone()).unwrap();
                    let text = coded["data"][i]["embedding"].as_str().unwrap();
                    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                    assert_eq!(BASE64_STANDARD.decode(text).unwrap(), bytes, "{input} {dimensions}");
                    let own: Vec<f32> =
                        serde_json::from_value(whole["data"][i]["embedding"].clone()).unwrap();
                    let own = &own[..dimensions];
                    let length = own.iter().map(|x| x * x).sum::<f32>().sqrt();
                    let divisor = if normalizes && dimensions < 4 { length } else { 1.0 };
                    for (x, own) in vector.iter().zip(own) {
                        assert!((x - own / divisor).abs() < 1e-6, "{input} {dimensions}: {vector:?}");
                    }
                    assert_eq!(vector.len(), dimensions);
                }
            }
        }
    }
}

/// Names that clients send where none is given reach the base model; so do its own.
#[tokio::test]
async fn names_of_the_base_model() {
    let router = Router::start(pooling(Task::Embed)).await;
    let own = router.ok("/v1/embeddings", &json!({"input": "a"})).await["model"].clone();
    for (model, reported) in [
        (json!(null), &own),
        (json!(""), &own),
        (json!("dummy"), &own),
        (json!("tgi"), &own),
        (own.clone(), &own),
        (json!("__base_model__"), &json!("__base_model__")),
    ] {
        let answer = router.ok("/v1/embeddings", &json!({"input": "a", "model": model})).await;
        assert_eq!(answer["model"], *reported, "{model}");
        let members = router.shard.saw(|seen| seen.added().last().map(|new| new.members.len())).await;
        assert_eq!(members, 0, "{model}");
    }
    for adapter in ["sql", "pirate"] {
        let answer = router.ok("/v1/embeddings", &json!({"input": "a", "model": adapter})).await;
        assert_eq!(answer["model"], adapter);
        assert_eq!(router.shard.last_adapter().await.as_deref(), Some(adapter));
    }
}

/// Every route of another task is refused, and says what the model does.
#[tokio::test]
async fn models_are_not_asked_for_what_they_do_not_do() {
    let classifies = pooling(Task::ClassifyTokens);
    let embeds = pooling(Task::Embed);
    let generates = Script::saying(tokens("a"));
    let (text, chat) = (json!({"inputs": "a"}), json!({"messages": [{"role": "user", "content": "a"}]}));
    let no_text = "models don't support text generation";
    for (script, does, routes) in [
        (
            classifies,
            "classifies",
            [
                ("/embed", "embeddings"),
                ("/v1/embeddings", "embeddings"),
                ("/generate", no_text),
                ("/v1/chat/completions", no_text),
                ("/v1/completions", no_text),
            ],
        ),
        (
            embeds,
            "embeds",
            [
                ("/classify", "classification"),
                ("/classify_batch", "classification"),
                ("/generate", no_text),
                ("/v1/chat/completions", no_text),
                ("/generate_stream", no_text),
            ],
        ),
        (
            generates,
            "generates text",
            [
                ("/embed", "embeddings"),
                ("/v1/embeddings", "embeddings"),
                ("/classify", "classification"),
                ("/classify_batch", "classification"),
                ("/embed", "embeddings"),
            ],
        ),
    ] {
        let router = Router::start(script).await;
        for (path, words) in routes {
            let body = match path {
                "/v1/embeddings" => &json!({"input": "a"}),
                "/v1/completions" => &json!({"prompt": "a"}),
                "/v1/chat/completions" => &chat,
                "/classify_batch" => &json!({"inputs": ["a"]}),
                _ => &text,
            };
            let (status, answer) = router.post(path, body).await;
            let expected = if path.starts_with("/v1/") { 400 } else { 422 };
            assert_eq!(status, expected, "{path}: {answer}");
            let answer = answer.to_string();
            assert!(answer.contains(words) && answer.contains(does), "{path}: {answer}");
        }
    }
}
