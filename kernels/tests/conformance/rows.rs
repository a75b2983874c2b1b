//! Operations that work row by row: norms, activations, the residual stream, lookups, logits.

use kernels::{
    Activation, Backend, Branch, DType, Embedding, LogitShape, Matrix, Norm, NormKind, Output, Projection,
    Residual, SampleRow, SamplingParams,
    reference::{self, Table},
    testing::{Numbers, assert_close, batch},
};

use super::{collect, device_batch, mat, rows_of, tensor, wide_mat};

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh];
/// Rows and columns that kernels take apart in every way.
const SHAPES: [[usize; 2]; 7] = [[1, 1], [1, 64], [7, 33], [20, 576], [3, 4097], [65, 130], [2, 2560]];

/// All norms of a width, with their weights on the host.
fn norms(numbers: &mut Numbers, cols: usize) -> Vec<reference::Norm> {
    let kinds = [NormKind::Rms, NormKind::Layer].into_iter().flat_map(|kind| [(kind, false), (kind, true)]);
    let norm = |(kind, bias): (NormKind, bool)| {
        let weight = numbers.table(1, cols).data;
        let bias = bias.then(|| numbers.table(1, cols).data);
        reference::Norm { kind, weight, bias, eps: 1e-3 }
    };
    kinds.map(norm).collect()
}

/// A norm's vectors on a device.
pub(super) struct Vectors<B: Backend> {
    weight: B::Vector,
    bias: Option<B::Vector>,
}

impl<B: Backend> Vectors<B> {
    pub(super) fn new(ops: &B, norm: &reference::Norm) -> Vectors<B> {
        let vector = |values: &Vec<f32>| ops.vector(values).unwrap();
        Vectors { weight: vector(&norm.weight), bias: norm.bias.as_ref().map(vector) }
    }

    pub(super) fn as_norm(&self, norm: &reference::Norm) -> Norm<'_, B> {
        Norm { kind: norm.kind, weight: &self.weight, bias: self.bias.as_ref(), eps: norm.eps }
    }
}

pub(super) fn norms_of_any_width<B: Backend>(ops: &B) {
    let mut numbers = Numbers(4);
    for [rows, cols] in SHAPES {
        // Far from zero, where a mean matters.
        let mut x = numbers.table(rows, cols);
        x.data.iter_mut().for_each(|x| *x += 2.0);
        for norm in norms(&mut numbers, cols) {
            let vectors = Vectors::new(ops, &norm);
            let expected = reference::normalize(&x, &norm);
            let what = format!("{:?} norm of {rows}x{cols}, bias: {}", norm.kind, norm.bias.is_some());
            for mut y in [ops.mat(rows, cols).unwrap(), ops.wide_mat(rows, cols).unwrap()] {
                ops.normalize(&wide_mat(ops, &x), vectors.as_norm(&norm), &mut y).unwrap();
                assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            }
        }
    }
}

/// The stream itself becomes its norm, and the projection that reads it next gets a copy.
pub(super) fn norms_of_the_stream_itself<B: Backend>(ops: &B) {
    let mut numbers = Numbers(24);
    for [rows, cols] in SHAPES {
        let mut x = numbers.table(rows, cols);
        x.data.iter_mut().for_each(|x| *x += 2.0);
        for norm in norms(&mut numbers, cols) {
            let vectors = Vectors::new(ops, &norm);
            let expected = reference::normalize(&x, &norm);
            let what =
                format!("{:?} norm in place of {rows}x{cols}, bias: {}", norm.kind, norm.bias.is_some());
            for mut y in [ops.mat(rows, cols).unwrap(), ops.wide_mat(rows, cols).unwrap()] {
                let mut stream = wide_mat(ops, &x);
                ops.normalize_stream(&mut stream, vectors.as_norm(&norm), &mut y).unwrap();
                assert_close(&what, &ops.download(&stream).unwrap(), &expected.data, DType::F32);
                assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            }
            let mut narrow = ops.mat(rows, cols + 1).unwrap();
            let refused = ops.normalize_stream(&mut wide_mat(ops, &x), vectors.as_norm(&norm), &mut narrow);
            assert!(refused.unwrap_err().to_string().contains("columns of y"), "{what}");
        }
    }
}

pub(super) fn activations_and_gates<B: Backend>(ops: &B) {
    let mut numbers = Numbers(14);
    for [rows, cols] in SHAPES {
        for f in ACTIVATIONS {
            let mut x = numbers.table(rows, 2 * cols);
            // From where all is zero to where nothing is.
            x.data.iter_mut().enumerate().for_each(|(i, x)| *x *= [1.0, 4.0, 90.0][i % 3]);
            let what = format!("{f:?} of {rows}x{cols}");
            let mut y = ops.mat(rows, 2 * cols).unwrap();
            ops.activate(&mat(ops, &x), f, &mut y).unwrap();
            let expected = reference::activate(&x, f);
            assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
            let mut y = ops.mat(rows, cols).unwrap();
            ops.gate(&mat(ops, &x), f, &mut y).unwrap();
            assert_close(&what, &ops.download(&y).unwrap(), &reference::gate(&x, f).data, ops.dtype());
        }
    }
}

/// Products that are activated and gated on their way.
pub(super) fn products_that_are_activated<B: Backend>(ops: &B) {
    let mut numbers = Numbers(15);
    for [rows, cols] in [[1, 1], [1, 64], [7, 33], [20, 128], [65, 130]] {
        let (x, w) = (numbers.table(rows, 40), numbers.table(2 * cols, 40));
        let bias = numbers.table(1, 2 * cols).data;
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let by = Projection { weight: &weight, bias: Some(&vector), lora: None };
        let expected = reference::linear(&x, &w, Some(&bias));
        for activation in ACTIVATIONS {
            let mut products = ops.mat(rows, 2 * cols).unwrap();
            let mut y = ops.mat(rows, 2 * cols).unwrap();
            let out = Output::Activate { activation, products: &mut products, y: &mut y };
            ops.linear(&mat(ops, &x), by, out).unwrap();
            let activated = reference::activate(&expected, activation);
            assert_close("activated", &ops.download(&y).unwrap(), &activated.data, ops.dtype());
            let mut y = ops.mat(rows, cols).unwrap();
            let out = Output::Gate { activation, products: &mut products, y: &mut y };
            ops.linear(&mat(ops, &x), by, out).unwrap();
            let gated = reference::gate(&expected, activation);
            assert_close("gated", &ops.download(&y).unwrap(), &gated.data, ops.dtype());
        }
    }
}

/// Everything that can be done to products before they are added to the stream, and to the stream afterwards.
pub(super) fn products_onto_the_stream<B: Backend>(ops: &B) {
    let mut numbers = Numbers(16);
    for [rows, cols] in [[1, 1], [1, 64], [7, 33], [20, 576], [65, 130], [3, 2560]] {
        let (x, w) = (numbers.table(rows, 40), numbers.table(cols, 40));
        let bias = numbers.table(1, cols).data;
        let (weight, vector) = (ops.weight(&[tensor(&w)]).unwrap(), ops.vector(&bias).unwrap());
        let by = Projection { weight: &weight, bias: Some(&vector), lora: None };
        let all: Vec<_> = norms(&mut numbers, cols).into_iter().map(Some).chain([None]).collect();
        for (i, post) in all.iter().enumerate() {
            for scale in [1.0, 0.25] {
                // Every post norm with another next one.
                let next = &all[(i + 1) % all.len()];
                let mut sums = numbers.table(rows, cols);
                let mut stream = wide_mat(ops, &sums);
                let mut added = reference::linear(&x, &w, Some(&bias));
                if let Some(post) = post {
                    added = reference::normalize(&added, post);
                }
                added.data.iter_mut().for_each(|x| *x *= scale);
                reference::add(&added, &mut sums);
                let post_vectors = post.as_ref().map(|post| Vectors::new(ops, post));
                let next_vectors = next.as_ref().map(|next| Vectors::new(ops, next));
                let mut products = ops.wide_mat(rows, cols).unwrap();
                let mut y = ops.mat(rows, cols).unwrap();
                let to = Residual {
                    stream: &mut stream,
                    products: &mut products,
                    post: post_vectors.as_ref().zip(post.as_ref()).map(|(v, post)| v.as_norm(post)),
                    scale,
                    branch: Branch::Only,
                    next: next_vectors.as_ref().zip(next.as_ref()).map(|(v, next)| (v.as_norm(next), &mut y)),
                };
                ops.linear(&mat(ops, &x), by, Output::Residual(to)).unwrap();
                let what = format!("stream of {rows}x{cols}, post norm {i}, scale {scale}");
                assert_close(&what, &ops.download(&stream).unwrap(), &sums.data, ops.dtype());
                if let Some(next) = next {
                    // From the stream as it is: a norm makes its errors larger.
                    let stream = Table { cols, data: ops.download(&stream).unwrap() };
                    let expected = reference::normalize(&stream, next);
                    assert_close(&what, &ops.download(&y).unwrap(), &expected.data, ops.dtype());
                }
            }
        }
    }
}

/// Two branches that read the same norm, whose sum is taken over all ranks at once.
pub(super) fn parallel_branches<B: Backend>(ops: &B) {
    let mut numbers = Numbers(17);
    for [rows, cols] in [[1, 64], [5, 33], [70, 128]] {
        let (x, first, second) = (numbers.table(rows, 40), numbers.table(cols, 40), numbers.table(cols, 40));
        let mut sums = numbers.table(rows, cols);
        let mut stream = wide_mat(ops, &sums);
        let norm = norms(&mut numbers, cols).remove(3);
        let vectors = Vectors::new(ops, &norm);
        let (mut products, mut y) = (ops.wide_mat(rows, cols).unwrap(), ops.mat(rows, cols).unwrap());
        for (w, branch) in [(&first, Branch::First), (&second, Branch::Second)] {
            let weight = ops.weight(&[tensor(w)]).unwrap();
            let next = (branch == Branch::Second).then(|| (vectors.as_norm(&norm), &mut y));
            let (stream, products) = (&mut stream, &mut products);
            let to = Residual { stream, products, post: None, scale: 1.0, branch, next };
            ops.linear(&mat(ops, &x), Projection::new(&weight, None), Output::Residual(to)).unwrap();
            reference::add(&reference::linear(&x, w, None), &mut sums);
        }
        assert_close("both branches", &ops.download(&stream).unwrap(), &sums.data, ops.dtype());
        let expected = reference::normalize(&sums, &norm);
        assert_close("their norm", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

pub(super) fn logits_are_scaled_and_capped<B: Backend>(ops: &B) {
    let mut numbers = Numbers(18);
    for (rows, vocabulary, room) in [(1, 50, 0), (3, 1000, 7), (5, 129, 64), (40, 333, 1)] {
        let (x, w) = (numbers.table(rows, 40), numbers.table(vocabulary, 40));
        let weight = ops.weight(&[tensor(&w)]).unwrap();
        for shape in [
            LogitShape::PLAIN,
            LogitShape { scale: 0.125, softcap: None },
            LogitShape { scale: 1.0, softcap: Some(2.0) },
            LogitShape { scale: 3.0, softcap: Some(5.0) },
        ] {
            let mut y = ops.wide_mat(rows, vocabulary + room).unwrap();
            let out = Output::Logits { y: &mut y, shape };
            ops.linear(&mat(ops, &x), Projection::new(&weight, None), out).unwrap();
            let mut expected = reference::linear(&x, &w, None);
            reference::shape_logits(&mut expected, shape);
            let got = ops.download(&y).unwrap();
            let (known, beyond): (Vec<_>, Vec<_>) =
                got.iter().enumerate().partition(|(i, _)| i % (vocabulary + room) < vocabulary);
            assert!(beyond.iter().all(|(_, logit)| **logit == f32::NEG_INFINITY), "{room} more: {shape:?}");
            let known: Vec<f32> = known.into_iter().map(|(_, logit)| *logit).collect();
            assert_close(&format!("logits {shape:?}"), &known, &expected.data, ops.dtype());
        }
    }
}

pub(super) fn embeddings_are_scaled_and_know_positions<B: Backend>(ops: &B) {
    let mut numbers = Numbers(19);
    for (cols, offset, scale) in [(40, 0, 1.0), (33, 2, 5.5), (576, 2, 0.5), (1, 0, 3.0), (128, 7, 24.0)] {
        let (table, positions) = (numbers.table(60, cols), numbers.table(400, cols));
        let (weight, learned) =
            (ops.weight(&[tensor(&table)]).unwrap(), ops.weight(&[tensor(&positions)]).unwrap());
        let sampler = ops.sampler(1, 60).unwrap();
        let host = batch(&[(5, 0), (1, 300), (17, 16), (1, 0)], &[]);
        let device = device_batch(ops, &host);
        for learned in [None, Some((&learned, offset))] {
            let mut y = ops.wide_mat(host.rows(), cols).unwrap();
            let by = Embedding { table: &weight, scale, positions: learned, lora: None };
            ops.embed(&device, &sampler, by, &mut y).unwrap();
            let expected = host.tokens.iter().zip(&host.positions).flat_map(|(&token, &position)| {
                let position = positions.row(offset + position as usize);
                let add = if learned.is_some() { 1.0 } else { 0.0 };
                table.row(token as usize).iter().zip(position).map(move |(x, p)| scale * x + add * p)
            });
            let expected: Vec<f32> = expected.collect();
            assert_close("embedding", &ops.download(&y).unwrap(), &expected, ops.dtype());
        }
    }
}

pub(super) fn embedding_takes_the_token_sampled_last<B: Backend>(ops: &B) {
    let table = Numbers(6).table(60, 40);
    let weight = ops.weight(&[tensor(&table)]).unwrap();
    let mut sampler = ops.sampler(4, 60).unwrap();
    ops.seat(&mut sampler, 2, &SamplingParams::default(), &[1], &[]).unwrap();
    let mut logits = vec![0.0; 60];
    logits[17] = 3.0;
    let row = SampleRow { row: 0, seat: 2 };
    let pending = ops.sample(&mat(ops, &Table { cols: 60, data: logits }), &[row], &mut sampler).unwrap();
    assert_eq!(collect(ops, pending)[0].token, 17);
    let mut host = batch(&[(2, 0)], &[]);
    host.tokens = vec![5, -3];
    let mut y = ops.wide_mat(2, 40).unwrap();
    ops.embed(&device_batch(ops, &host), &sampler, rows_of(&weight), &mut y).unwrap();
    let expected = Table { cols: 40, data: [table.row(5), table.row(17)].concat() };
    assert_close("embed", &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    let mut last = ops.mat(2, 40).unwrap();
    ops.gather_logit_rows(&mat(ops, &expected), &device_batch(ops, &host), &mut last).unwrap();
    assert_eq!(last.rows(), 1);
    assert_close("gather", &ops.download(&last).unwrap(), table.row(17), ops.dtype());
}
