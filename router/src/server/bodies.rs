//! Reading of bodies, with a bound on the memory that they take together and a deadline for each.

use std::{error::Error, io, net::IpAddr, time::Duration};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header::CONTENT_ENCODING},
};
use futures::StreamExt;
use http_body::Body as _;
use tokio::{sync::Semaphore, task::yield_now, time::timeout};

use crate::{
    api::error::ApiError,
    fair::{FairSemaphore, Grant, Share},
    principal::TenantId,
};

/// A body up to this size needs no memory of `--max-body-memory`: no more than a connection takes in any case. So a
/// short request never waits for large ones.
const SMALL: usize = 16 << 10;

/// Responses to bodies past their deadline that may be on their way at the same time. When thousands end at once, other
/// clients' tokens go out between them.
const LATE: usize = 16;

/// The party that a body counts for: memory is shared among tenants, and among the addresses of each.
pub(super) type Party = (TenantId, IpAddr);

/// The memory of `--max-body-memory`.
pub(super) struct Bodies {
    memory: FairSemaphore<Party>,
    limit: usize,
    deadline: Duration,
    late: Semaphore,
}

/// A whole body and the memory that it takes.
pub(super) struct Bytes {
    pub(super) bytes: Vec<u8>,
    _memory: Option<Grant<Party>>,
}

impl Bodies {
    /// Bodies of at most `limit` bytes, which have to be there by the deadline.
    pub(super) fn new(memory: usize, limit: usize, deadline: Duration) -> Bodies {
        // Two of the largest: a party may hold half of the memory, and has to get at least one of them.
        let memory = FairSemaphore::new(memory.max(2 * limit), Share::AsMuchAsIsFree);
        Bodies { memory, limit, deadline, late: Semaphore::new(LATE) }
    }

    /// Reads a body as memory allows: until there is some the client is not read from.
    pub(super) async fn read(&self, request: Request, party: Party) -> Result<Bytes, ApiError> {
        check_encoding(request.headers())?;
        match timeout(self.deadline, self.read_all(request.into_body(), party)).await {
            Ok(read) => read,
            Err(_) => {
                // Never closed.
                let _turn = self.late.acquire().await;
                Err(ApiError::Slow)
            }
        }
    }

    async fn read_all(&self, body: Body, party: Party) -> Result<Bytes, ApiError> {
        let limit = self.limit;
        let announced = body.size_hint().exact().map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        if announced.is_some_and(|bytes| bytes > limit) {
            return Err(ApiError::TooLarge { limit });
        }
        let mut memory = match announced {
            Some(bytes) if bytes > SMALL => Some(self.memory.acquire(party, bytes).await),
            _ => None,
        };
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| unread(&error))?;
            if bytes.len() + chunk.len() > limit {
                return Err(ApiError::TooLarge { limit });
            }
            if memory.is_none() && bytes.len() + chunk.len() > SMALL {
                // Of unknown length. Bodies that took more piece by piece could wait for each other.
                memory = Some(self.memory.acquire(party, limit).await);
            }
            bytes.extend_from_slice(&chunk);
            if memory.is_some() {
                // Tokens for others go out between the pieces of large bodies.
                yield_now().await;
            }
        }
        if let Some(memory) = &mut memory {
            memory.shrink(bytes.len());
        }
        Ok(Bytes { bytes, _memory: memory })
    }
}

/// Refuses compressed bodies: how large they are would show only while they take memory.
fn check_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    for value in headers.get_all(CONTENT_ENCODING) {
        let encoding = String::from_utf8_lossy(value.as_bytes());
        if encoding.split(',').any(|one| !matches!(&*one.trim().to_ascii_lowercase(), "" | "identity")) {
            return Err(ApiError::Encoding(encoding.into_owned()));
        }
    }
    Ok(())
}

/// The reason that the rest of a body cannot be read.
fn unread(error: &axum::Error) -> ApiError {
    let mut cause: &dyn Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => ApiError::Incomplete,
        _ => ApiError::Unreadable(cause.to_string()),
    }
}
