//! Steps on their way to the ranks: a step is encoded once, and all ranks get the same bytes.

use futures::Stream;
use prost::{
    Message,
    bytes::{BufMut, Bytes},
};
use proto::ExecuteEvent;
use tonic::{
    Request, Response, Status, Streaming,
    client::Grpc,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
    codegen::{GrpcMethod, http::uri::PathAndQuery},
    transport::Channel,
};
use tonic_prost::{ProstCodec, ProstDecoder};

use crate::wire;

/// A step as it is sent.
pub(super) fn encode(step: proto::Step) -> Bytes {
    wire::request(step).encode_to_vec().into()
}

/// Masks as they are sent.
pub(super) fn encode_masks(masks: proto::Masks) -> Bytes {
    wire::masks_request(masks).encode_to_vec().into()
}

/// Calls Execute as the generated client does, but with steps that are encoded already.
pub(super) async fn execute(
    channel: Channel,
    steps: impl Stream<Item = Bytes> + Send + 'static,
) -> Result<Response<Streaming<ExecuteEvent>>, Status> {
    let mut client = Grpc::new(channel)
        .max_decoding_message_size(proto::MAX_MESSAGE)
        .max_encoding_message_size(proto::MAX_MESSAGE);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(steps);
    request.extensions_mut().insert(GrpcMethod::new(proto::shard_server::SERVICE_NAME, "Execute"));
    client.streaming(request, PathAndQuery::from_static("/shard.v1.Shard/Execute"), Encoded).await
}

/// Requests are encoded already, events are not.
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = ExecuteEvent;
    type Encoder = Copied;
    type Decoder = ProstDecoder<ExecuteEvent>;

    fn encoder(&mut self) -> Copied {
        Copied
    }

    fn decoder(&mut self) -> ProstDecoder<ExecuteEvent> {
        ProstCodec::<(), ExecuteEvent>::raw_decoder(BufferSettings::default())
    }
}

struct Copied;

impl Encoder for Copied {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}
