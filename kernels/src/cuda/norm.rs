//! RMS norm and layer norm of the residual stream, alone or fused with the addition to it.

use super::{CudaBackend, CudaMat, CudaVector, ffi, memory};
use crate::{Matrix, Norm, NormKind, Result};

/// What is done to products on their way into the stream, and to the stream then.
pub(super) struct Added<'a> {
    pub(super) post: Option<Norm<'a, CudaBackend>>,
    pub(super) scale: f32,
    pub(super) stream: &'a mut CudaMat,
    pub(super) next: Option<(Norm<'a, CudaBackend>, &'a mut CudaMat)>,
}

/// The arguments of a norm of rows of so many columns, whose weight and bias have `len` elements.
pub(super) fn args(op: &'static str, norm: &Norm<'_, CudaBackend>, len: usize) -> Result<ffi::NormArgs> {
    memory::expect(op, "weights", norm.weight.len, len)?;
    if let Some(bias) = norm.bias {
        memory::expect(op, "elements of the bias", bias.len, len)?;
    }
    Ok(ffi::NormArgs {
        weight: norm.weight.buffer.at(),
        bias: norm.bias.map_or(0, |bias: &CudaVector| bias.buffer.at()),
        eps: norm.eps,
        layer: i32::from(norm.kind == NormKind::Layer),
    })
}

/// Refuses weights and a result that are not of the stream's width: before anything is added to it.
pub(super) fn expect(x: &CudaMat, norm: &Norm<'_, CudaBackend>, y: &CudaMat) -> Result<()> {
    let op = "normalize";
    x.expect_wide(op)?;
    y.expect_cols(op, "columns of y", x.cols())?;
    args(op, norm, x.cols()).map(|_| ())
}

/// `y = norm(x)`
pub(super) fn normalize(
    be: &CudaBackend,
    x: &CudaMat,
    norm: &Norm<'_, CudaBackend>,
    y: &mut CudaMat,
) -> Result<()> {
    let op = "normalize";
    expect(x, norm, y)?;
    y.resize(op, x.rows())?;
    let (norm, rows, cols) = (args(op, norm, x.cols())?, x.rows() as i32, x.cols() as i32);
    // SAFETY: shapes were checked.
    be.launch(op, x.rows(), |elem, stream| unsafe {
        ffi::lorax_normalize(elem, y.wide(), x.at(), &raw const norm, y.at(), rows, cols, stream)
    })
}

/// `stream = norm(stream)`, and `y` is a copy of it.
pub(super) fn normalize_stream(
    be: &CudaBackend,
    stream: &mut CudaMat,
    norm: &Norm<'_, CudaBackend>,
    y: &mut CudaMat,
) -> Result<()> {
    let op = "normalize_stream";
    expect(stream, norm, y)?;
    y.resize(op, stream.rows())?;
    let (norm, rows, cols) = (args(op, norm, stream.cols())?, stream.rows() as i32, stream.cols() as i32);
    // SAFETY: shapes were checked.
    be.launch(op, stream.rows(), |elem, queue| unsafe {
        let (x, wide) = (stream.at(), y.wide());
        ffi::lorax_normalize_stream(elem, wide, x, &raw const norm, y.at(), rows, cols, queue)
    })
}

/// Checks an addition to the stream, and says where it goes.
pub(super) fn sink(x: &CudaMat, to: Added<'_>) -> Result<ffi::SinkArgs> {
    let (op, Added { post, scale, stream: sums, next }) = ("add", to);
    x.expect_wide(op)?;
    sums.expect_wide(op)?;
    sums.expect_cols(op, "columns of the stream", x.cols())?;
    memory::expect(op, "rows of the stream", sums.rows(), x.rows())?;
    let mut sink = ffi::SinkArgs { stream: sums.at(), scale, ..ffi::SinkArgs::default() };
    if let Some(post) = post {
        sink.post = args(op, &post, x.cols())?;
    }
    if let Some((norm, y)) = next {
        expect(sums, &norm, y)?;
        y.resize(op, x.rows())?;
        (sink.next, sink.y, sink.wide) = (args(op, &norm, x.cols())?, y.at(), y.wide());
    }
    Ok(sink)
}

/// `stream += scale · post(x)`, then `y = next(stream)`, in one launch.
pub(super) fn add(be: &CudaBackend, x: &CudaMat, to: Added<'_>) -> Result<()> {
    let sink = sink(x, to)?;
    let (rows, cols) = (x.rows() as i32, x.cols() as i32);
    // SAFETY: shapes were checked.
    be.launch("add", x.rows(), |elem, stream| unsafe {
        ffi::lorax_add_norm(elem, x.at(), &raw const sink, rows, cols, stream)
    })
}
