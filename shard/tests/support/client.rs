//! The router's end of the wire.
#![allow(dead_code, reason = "each program of tests uses a part of it")]

use std::path::Path;

use hyper_util::rt::TokioIo;
use lorax_shard::{
    adapters::AdapterFile,
    step::{Info, Task},
};
use proto::{
    ExecuteRequest, NewSequence, SequenceRows, StageRequest, Step, execute_request, shard_client::ShardClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// A client of the shard that listens on a socket.
pub(crate) async fn connect(socket: &Path) -> ShardClient<Channel> {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://shard");
    ShardClient::new(endpoint.connect_with_connector(connect).await.unwrap())
}

/// Has the adapter in a folder staged as it is now.
pub(crate) fn order(folder: &Path, session: u64) -> StageRequest {
    let order = crate::tiny::order(folder, session);
    let file = |file: &AdapterFile| proto::AdapterFile {
        name: file.name.to_str().unwrap().into(),
        stamp: file.stamp.map(|stamp| proto::Stamp {
            device: stamp.device,
            inode: stamp.inode,
            size: stamp.size,
            modified_s: stamp.modified.0,
            modified_ns: stamp.modified.1,
            changed_s: stamp.changed.0,
            changed_ns: stamp.changed.1,
        }),
    };
    let files = order.parts[0].files.iter().map(file).collect();
    let (name, at) = (order.name.clone(), folder.to_str().unwrap().into());
    let parts = vec![proto::AdapterPart { folder: at, files, weight: 1.0, name }];
    let content = order.content.0.to_vec();
    StageRequest { session, content, name: order.name, parts, merge: None, max_bytes: 1 << 20 }
}

/// A step as it is sent.
pub(crate) fn request(step: Step) -> ExecuteRequest {
    ExecuteRequest { request: Some(execute_request::Request::Step(step)) }
}

/// The first step of a session, which samples a token of a prompt.
pub(crate) fn first_step(session: u64) -> Step {
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 96).collect();
    Step {
        id: 1,
        session,
        added: vec![NewSequence { sequence: 5, prompt_len: 20, tokens, ..NewSequence::default() }],
        rows: vec![SequenceRows {
            sequence: 5,
            rows: 20,
            new_blocks: vec![3, 9],
            sample: 1,
            ..SequenceRows::default()
        }],
        ..Step::default()
    }
}

pub(crate) fn info() -> Info {
    Info {
        dtype: "float32".into(),
        device: "cpu".into(),
        rank: 0,
        world: 1,
        vocab_size: 96,
        max_positions: 256,
        eos_token_ids: vec![2],
        num_blocks: 16,
        block_size: 16,
        num_slots: 2,
        adapter_bytes: 0,
        max_rows: 32,
        max_sequences: 4,
        max_logit_rows: 32,
        longest_step_us: 1000,
        kv_window: 0,
        rope_switch: 0,
        rope_dynamic: 0,
        hidden_size: 32,
        task: Task::Generate,
        bidirectional: false,
    }
}
