//! Choices of the next token among those that a mask allows.

use kernels::{Backend, SampleRow, Sampled, SamplingParams, TokenMask, reference::Table, testing::Numbers};

use super::{
    collect,
    sampling::{check_filters, peaks},
    wide_mat,
};

/// A mask that allows these tokens.
fn mask(allowed: &[u32], vocab: usize) -> TokenMask {
    let mut bytes = vec![0; vocab.div_ceil(8)];
    allowed.iter().for_each(|token| bytes[*token as usize / 8] |= 1 << (token % 8));
    TokenMask::new(&bytes, vocab).unwrap()
}

/// Logits that are hard to choose among: random ones, with these values for some or all tokens.
fn odd_logits(vocab: usize) -> Vec<Table> {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let with = |every: usize, value: f32| {
        let mut logits = Numbers(31).table(1, vocab);
        logits.data.iter_mut().step_by(every).for_each(|logit| *logit = value);
        logits
    };
    let of = [
        (1, nan),
        (1, -inf),
        (1, inf),
        (1, 0.0),
        (1, f32::MIN),
        (1, f32::MAX),
        (2, nan),
        (2, -inf),
        (3, inf),
        (7, nan),
        (5, 1e38),
    ];
    of.iter().map(|&(every, value)| with(every, value)).chain([Numbers(32).table(1, vocab)]).collect()
}

/// Whatever the logits and the parameters are, a token that the mask allows is chosen.
pub(super) fn masks_hold_for_any_logits<B: Backend>(ops: &B) {
    let warm = || SamplingParams { temperature: 1.0, ..Default::default() };
    let params = [
        SamplingParams::default(),
        warm(),
        SamplingParams { temperature: 1e-5, ..warm() },
        SamplingParams { top_k: 4, ..warm() },
        SamplingParams { top_p: 0.3, ..warm() },
        SamplingParams { min_p: 0.5, ..warm() },
        SamplingParams { typical_p: 0.3, ..warm() },
        SamplingParams { top_k: 4, top_p: 0.3, min_p: 0.5, typical_p: 0.3, ..warm() },
        SamplingParams { repetition_penalty: 2.0, presence_penalty: 1.0, ..warm() },
        SamplingParams { logit_bias: vec![(1, f32::MAX), (2, f32::MIN)], ..Default::default() },
    ];
    for vocab in [1, 8, 31, 32, 33, 50, 1000] {
        let last = vocab as u32 - 1;
        let allowed: [Vec<u32>; 5] = [
            vec![0],
            vec![last],
            vec![last / 2],
            vec![last / 3, last],
            (0..=last).filter(|t| t % 3 == 0).collect(),
        ];
        let masks = allowed.each_ref().map(|allowed| mask(allowed, vocab));
        // Every parameter under every mask, in one launch.
        let seats: Vec<_> = params.iter().flat_map(|p| (0..masks.len()).map(move |m| (p, m))).collect();
        let rows: Vec<_> = (0..seats.len() as u32).map(|seat| SampleRow { row: 0, seat }).collect();
        let masks: Vec<_> = seats.iter().map(|(_, m)| Some(&masks[*m])).collect();
        for logits in odd_logits(vocab) {
            let x = wide_mat(ops, &logits);
            let mut sampler = ops.sampler(seats.len(), vocab).unwrap();
            for (seat, (params, _)) in seats.iter().enumerate() {
                let mut params = (*params).clone();
                params.logit_bias.retain(|(token, _)| *token <= last);
                ops.seat(&mut sampler, seat as u32, &params, &[last], &[0]).unwrap();
            }
            let chosen = collect(ops, ops.sample_masked(&x, &rows, &masks, &mut sampler).unwrap());
            for (Sampled { token, .. }, (params, m)) in chosen.iter().zip(&seats) {
                assert!(allowed[*m].contains(token), "{token} of {vocab}, {params:?}, {logits:?}");
            }
        }
    }
}

/// Where no token that a mask allows has a probability, the first of them is chosen; and logits that are larger than
/// any number once they are divided by the temperature keep their order.
pub(super) fn masks_without_a_probable_token<B: Backend>(ops: &B) {
    const VOCAB: usize = 40;
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let improbable = [-inf, nan];
    let allowed: [&[u32]; 5] = [&[0], &[39], &[7, 8, 33], &[1, 2, 3, 4, 5], &[31, 32]];
    let temperatures = [0.0, 1e-5, 0.5, 1.0, 3.0];
    let rows: Vec<_> = (0..temperatures.len() as u32).map(|seat| SampleRow { row: 0, seat }).collect();
    let mut sampler = ops.sampler(rows.len(), VOCAB).unwrap();
    let mut choose = |data: Vec<f32>, allowed: &[u32]| {
        for (seat, &temperature) in temperatures.iter().enumerate() {
            let params = SamplingParams { temperature, ..Default::default() };
            ops.seat(&mut sampler, seat as u32, &params, &[], &[]).unwrap();
        }
        let (x, mask) = (wide_mat(ops, &Table { cols: VOCAB, data }), mask(allowed, VOCAB));
        let sampled = ops.sample_masked(&x, &rows, &vec![Some(&mask); rows.len()], &mut sampler).unwrap();
        collect(ops, sampled).iter().map(|choice| choice.token).collect::<Vec<_>>()
    };
    for allowed in allowed {
        for value in improbable {
            let mut logits = Numbers(34).table(1, VOCAB).data;
            allowed.iter().for_each(|token| logits[*token as usize] = value);
            assert_eq!(choose(logits, allowed), [allowed[0]; 5], "{value} for {allowed:?}");
        }
        for (each, best) in [(f32::MIN, -2e38), (-3e38, -2.9e38), (2e38, f32::MAX), (-1e38, 1e38)] {
            let mut logits = vec![each; VOCAB];
            let last = allowed[allowed.len() - 1];
            logits[last as usize] = best;
            assert_eq!(choose(logits, allowed), [last; 5], "{best} above {each}, {allowed:?}");
        }
    }
}

/// A mask leaves the order of what it allows, what is reported, and the rows beside it as they are.
pub(super) fn masks_change_nothing_else<B: Backend>(ops: &B) {
    let logits = Numbers(33).table(2, 50);
    let x = wide_mat(ops, &logits);
    let rows = [SampleRow { row: 0, seat: 0 }, SampleRow { row: 1, seat: 1 }];
    let params = SamplingParams { num_top: 50, ..Default::default() };
    let draw = |masks: [Option<&TokenMask>; 2]| {
        let mut sampler = ops.sampler(2, 50).unwrap();
        (0..2).for_each(|seat| ops.seat(&mut sampler, seat, &params, &[], &[]).unwrap());
        collect(ops, ops.sample_masked(&x, &rows, &masks, &mut sampler).unwrap())
    };
    let plain = draw([None, None]);
    let order: Vec<u32> = plain[0].top.iter().map(|top| top.0).collect();
    for place in [0, 1, 2, 5, 11, 20, 30, 44, 48, 49] {
        let mask = mask(&order[place..], 50);
        let masked = draw([Some(&mask), None]);
        assert_eq!((masked[0].token, masked[0].logprob), plain[0].top[place]);
        assert_eq!(masked[0].top, plain[0].top);
        assert_eq!(masked[1], plain[1]);
    }
    let mask = mask(&[1], 49);
    let mut sampler = ops.sampler(2, 50).unwrap();
    let error = ops.sample_masked(&x, &rows, &[None, Some(&mask)], &mut sampler).err().unwrap();
    assert_eq!(error.to_string(), "sample: tokens of a mask is 49, expected 50");
    assert!(ops.sample_masked(&x, &rows, &[None], &mut sampler).is_err());
    assert!(ops.sample_masked(&x, &rows, &[], &mut sampler).is_err());
}

/// Filters choose among what a mask allows: it comes before them.
pub(super) fn masks_come_before_filters<B: Backend>(ops: &B) {
    let (order, logits) = peaks();
    let order: Vec<u32> = order.iter().skip(1).step_by(2).copied().collect();
    let improbable = (0..logits.cols as u32).filter(|token| logits.data[*token as usize] < -10.0);
    let allowed: Vec<u32> = order.iter().copied().chain(improbable).collect();
    check_filters(ops, &logits, &order, Some(&mask(&allowed, logits.cols)));
}

/// A token that was chosen under a mask is counted like any other, and later draws go on after it.
pub(super) fn tokens_under_a_mask_are_counted<B: Backend>(ops: &B) {
    let data = (0..40).map(|token| if token == 21 { 1.5 } else { -0.01 * token as f32 }).collect();
    let x = wide_mat(ops, &Table { cols: 40, data });
    let rows = [SampleRow { row: 0, seat: 0 }];
    for forced in [0, 1, 7, 8, 21, 31, 32, 33, 38, 39] {
        let mask = mask(&[forced], 40);
        let warm = SamplingParams { temperature: 1.0, presence_penalty: 2.0, seed: 5, ..Default::default() };
        let greedy = SamplingParams { temperature: 0.0, ..warm.clone() };
        for params in [greedy, warm] {
            let mut sampler = ops.sampler(1, 40).unwrap();
            ops.seat(&mut sampler, 0, &params, &[], &[]).unwrap();
            let mut choose = |mask| {
                collect(ops, ops.sample_masked(&x, &rows, &[mask], &mut sampler).unwrap()).remove(0).token
            };
            assert_eq!(choose(Some(&mask)), forced);
            let next: Vec<u32> = (0..8).map(|_| choose(None)).collect();
            // As of a sequence that resumes behind this token.
            ops.seat(&mut sampler, 0, &params, &[], &[forced]).unwrap();
            let mut choose = || collect(ops, ops.sample(&x, &rows, &mut sampler).unwrap()).remove(0).token;
            let resumed: Vec<u32> = (0..8).map(|_| choose()).collect();
            assert_eq!(next, resumed, "behind {forced}, {params:?}");
        }
    }
}

/// More masks than one launch takes, between rows that have none, and masks that are larger than what is copied to a
/// device at once.
pub(super) fn masks_of_many_rows<B: Backend>(ops: &B) {
    for (rows, vocab) in [(1100, 700), (1, 33), (7, 33_000), (40, 70_001), (3, 530_000)] {
        let logits = Numbers(18).table(1, vocab);
        let x = wide_mat(ops, &logits);
        let mut sampler = ops.sampler(rows, vocab).unwrap();
        let params = SamplingParams::default();
        (0..rows as u32).for_each(|seat| ops.seat(&mut sampler, seat, &params, &[], &[]).unwrap());
        let places: Vec<_> =
            (0..rows as u32).map(|row| SampleRow { row: 0, seat: rows as u32 - 1 - row }).collect();
        let allowed = |row: usize| [row * 7919 % vocab, vocab - 1 - row % vocab];
        let masks: Vec<_> = (0..rows)
            .map(|row| (row % 5 != 1).then(|| mask(&allowed(row).map(|token| token as u32), vocab)))
            .collect();
        let masks: Vec<_> = masks.iter().map(Option::as_ref).collect();
        let sampled = collect(ops, ops.sample_masked(&x, &places, &masks, &mut sampler).unwrap());
        let best = |tokens: &mut dyn Iterator<Item = usize>| {
            tokens.max_by(|a, b| logits.data[*a].total_cmp(&logits.data[*b]).then(b.cmp(a))).unwrap()
        };
        let best_of_all = best(&mut (0..vocab));
        for (row, sampled) in sampled.iter().enumerate() {
            let expected = match masks[row] {
                Some(_) => best(&mut allowed(row).into_iter()),
                None => best_of_all,
            };
            assert_eq!(sampled.token as usize, expected, "row {row} of {rows}, {vocab} tokens");
        }
    }
}

#[test]
fn a_mask_is_read_bit_by_bit() {
    for (vocab, bytes, first) in [
        (8, vec![0x80], Some(7)),
        (8, vec![0], None),
        (7, vec![0x80], None),
        (9, vec![0, 1], Some(8)),
        (9, vec![0, 2], None),
        (33, vec![0, 0, 0, 0, 1], Some(32)),
        (32, vec![0, 0, 0, 0x80], Some(31)),
        (40, vec![0, 0x10], Some(12)),
        (40, vec![0, 0, 0, 0, 0, 0xff], None),
        (0, vec![0xff], None),
        (64, vec![0xff; 8], Some(0)),
    ] {
        let mask = TokenMask::new(&bytes, vocab);
        assert_eq!(mask.as_ref().map(TokenMask::first), first, "{vocab} {bytes:?}");
        let Some(mask) = mask else { continue };
        for token in 0..vocab + 40 {
            let bit = bytes.get(token / 8).is_some_and(|byte| byte >> (token % 8) & 1 == 1);
            assert_eq!(mask.allows(token), bit && token < vocab, "{token} of {vocab}");
        }
    }
}
