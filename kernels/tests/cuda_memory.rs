//! A GPU without memory. Needs one, and has it alone: a program of one test.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kernels::{
    DType, Error, LinearLora, LoraPart, LoraSite, Output, Projection, RowSet, Span, cuda::CudaBackend,
    prelude::*, reference::Table, testing::batch,
};

const WIDE: usize = 8192;
/// More adapters than there can be room for in what the driver holds back.
const SLOTS: usize = 16;

/// An adapter of 16 MiB whose delta of a row that begins with 1 is `value`.
fn adapter(value: f32) -> Vec<LoraPart> {
    let rank = 512;
    let mut a = vec![0.0; WIDE * rank];
    a[0] = 1.0;
    let mut b = vec![0.0; WIDE * rank];
    b.iter_mut().step_by(rank).for_each(|x| *x = value);
    vec![LoraPart::delta((0, 0), rank, 1.0, &a, &b)]
}

#[test]
fn a_load_without_memory_is_an_error_and_the_card_goes_on() {
    let ops = CudaBackend::new(DType::Bf16, 0).unwrap();
    let sites = [LoraSite::linear(WIDE, &[WIDE])];
    let mut slots = ops.lora_slots(&sites, SLOTS).unwrap();
    let staged = [2.0, 3.0].map(|value| Arc::new(ops.stage(&sites, &adapter(value)).unwrap()));
    let host = batch(&[(3, 0)], &[Some(0)]);
    let mut device = ops.batch(3, host.blocks.len(), &[Span::Causal]).unwrap();
    ops.upload(&host, &mut device).unwrap();
    let zeros = Table { cols: WIDE, data: vec![0.0; WIDE * WIDE] };
    let data: Vec<u8> = zeros.data.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensor = kernels::HostTensor { dtype: DType::F32, rows: WIDE, cols: WIDE, data: data.into() };
    let weight = ops.weight(&[tensor]).unwrap();
    let mut x = ops.mat(3, WIDE).unwrap();
    let mut rows = vec![0.0; 3 * WIDE];
    rows.iter_mut().step_by(WIDE).for_each(|x| *x = 1.0);
    ops.fill(&mut x, &rows).unwrap();
    let mut y = ops.mat(3, WIDE).unwrap();
    let mut run = |slots: &kernels::cuda::CudaSlots, value: f32| {
        let lora = LinearLora { slots, site: 0, batch: &device, rows: RowSet::All };
        ops.linear(&x, Projection::new(&weight, Some(lora)), Output::Store(&mut y)).unwrap();
        assert!(ops.download(&y).unwrap().iter().all(|x| *x == value), "{value}");
    };
    let wait = |slots: &mut kernels::cuda::CudaSlots| while ops.loaded(slots).unwrap().is_empty() {};
    ops.load(&mut slots, 0, &staged[0], &[]).unwrap();
    wait(&mut slots);
    run(&slots, 2.0);
    // Down to the last pages.
    let mut filler = Vec::new();
    let mut rows = 1 << 17;
    while rows > 0 {
        match ops.mat(rows, WIDE) {
            Ok(full) => filler.push(full),
            Err(Error::OutOfMemory { .. }) => rows /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    let full = (1..SLOTS as u32).find(|&slot| ops.load(&mut slots, slot, &staged[1], &[]).is_err());
    let full = full.expect("the GPU is full");
    for _ in 0..10 {
        let error = ops.load(&mut slots, full, &staged[1], &[]).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        assert!(!ops.loaded(&mut slots).unwrap().contains(&full));
        run(&slots, 2.0);
    }
    drop(filler);
    ops.load(&mut slots, full, &staged[1], &[]).unwrap();
    wait(&mut slots);
    ops.load(&mut slots, 0, &staged[1], &[]).unwrap();
    wait(&mut slots);
    run(&slots, 3.0);
}
