//! NCCL, with one rank: two on one GPU are refused by it.

use std::sync::Arc;

use kernels::{
    Batch, DType, Error, Group, Matrix, Span,
    cuda::{CudaBackend, Transport},
    prelude::*,
    testing::batch,
};

/// Sums and columns of one rank are what they were, one by one and in replayed steps. Without the library, the error
/// names it.
#[test]
fn sums_and_columns_of_one_rank() {
    let be = CudaBackend::new(DType::Bf16, 0).unwrap();
    let be = match be.with_transport(Arc::new(Group::alone()), Transport::Nccl) {
        Ok(be) => be,
        Err(Error::Unavailable { missing, .. }) => {
            assert!(missing.contains("rank 0: NCCL cannot be loaded (libnccl.so.2: "), "{missing}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let described = be.describe_transport();
    assert!(described.starts_with("NCCL 2."), "{described}");
    let host: Batch = batch(&[(1, 3)], &[]);
    let mut device = be.batch(1, host.blocks.len(), &[Span::Causal]).unwrap();
    for (rows, cols) in [(1, 8), (3, 7), (64, 4096), (5000, 4096)] {
        let own: Vec<f32> = (0..rows * cols).map(|i| (i % 255) as f32 - 127.0).collect();
        let mut x = be.wide_mat(rows, cols).unwrap();
        let mut y = be.wide_mat(rows, cols).unwrap();
        be.fill(&mut x, &own).unwrap();
        for round in 0..4 {
            be.upload(&host, &mut device).unwrap();
            let mut step = || {
                be.all_reduce(&mut x)?;
                be.gather_columns(&x, &mut y)
            };
            if round == 0 { step() } else { be.step(&device, None, step) }.unwrap();
            assert_eq!(be.download(&x).unwrap(), own, "{rows} x {cols}, round {round}");
            assert_eq!(be.download(&y).unwrap(), own, "{rows} x {cols}, round {round}");
        }
        assert_eq!((x.rows(), y.rows()), (rows, rows));
        // Its graph has these matrices' addresses.
        device = be.batch(1, host.blocks.len(), &[Span::Causal]).unwrap();
    }
}
