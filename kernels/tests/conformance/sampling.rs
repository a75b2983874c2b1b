//! Choices of the next token.

use kernels::{
    Backend, Ban, SampleRow, SamplingParams, TokenMask,
    reference::{self, Table},
    testing::Numbers,
};

use super::{collect, mat, wide_mat};

pub(super) fn sampling_filters_and_reports<B: Backend>(ops: &B) {
    let logits = Numbers(7).table(3, 50);
    let x = mat(ops, &logits);
    let logprobs = reference::log_softmax(logits.row(1));
    let mut order: Vec<u32> = (0..50).collect();
    order.sort_by(|a, b| logprobs[*b as usize].total_cmp(&logprobs[*a as usize]).then(a.cmp(b)));
    let draw = |params: SamplingParams, output: &[u32]| {
        let mut sampler = ops.sampler(2, 50).unwrap();
        ops.seat(&mut sampler, 1, &params, &[order[2]], output).unwrap();
        collect(ops, ops.sample(&x, &[SampleRow { row: 1, seat: 1 }], &mut sampler).unwrap()).remove(0)
    };
    let greedy = draw(SamplingParams { num_top: 3, ..Default::default() }, &[]);
    assert_eq!(greedy.token, order[0]);
    assert!((greedy.logprob - logprobs[order[0] as usize]).abs() < 1e-4);
    assert_eq!(greedy.top.iter().map(|top| top.0).collect::<Vec<_>>(), order[..3]);
    let biased = SamplingParams { logit_bias: vec![(order[9], 50.0)], ..Default::default() };
    assert_eq!(draw(biased, &[]).token, order[9]);
    let present = SamplingParams { presence_penalty: 90.0, ..Default::default() };
    assert_eq!(draw(present.clone(), &[]).token, order[0], "the prompt does not count");
    assert_eq!(draw(present, &[order[0]]).token, order[1]);
    let warm = SamplingParams { temperature: 1.5, seed: 11, ..Default::default() };
    let kept = |params: &SamplingParams| {
        let mut kept: Vec<u32> =
            (0..300).map(|seed| draw(SamplingParams { seed, ..params.clone() }, &[]).token).collect();
        kept.sort_unstable();
        kept.dedup();
        kept.len()
    };
    assert!(kept(&warm) > 30);
    assert_eq!(kept(&SamplingParams { top_k: 3, ..warm.clone() }), 3);
    assert_eq!(kept(&SamplingParams { top_p: 1e-6, ..warm.clone() }), 1);
    assert_eq!(kept(&SamplingParams { min_p: 1.0, ..warm.clone() }), 1);
    assert!(kept(&SamplingParams { typical_p: 0.2, ..warm.clone() }) < 20);
    assert_eq!(draw(warm.clone(), &[]), draw(warm.clone(), &[]), "a seed gives the same token");
    let scored = collect(ops, ops.score(&x, &[(1, 5), (1, 6)], 1).unwrap());
    assert!((scored[1].logprob - logprobs[6]).abs() < 1e-4);
    assert_eq!(scored[0].top[0].0, order[0]);
}

/// Tokens that are banned are not chosen until so many have been generated, whether tokens are drawn or not.
pub(super) fn banned_tokens_wait<B: Backend>(ops: &B) {
    let logits = Numbers(7).table(3, 50);
    let x = mat(ops, &logits);
    let mut order: Vec<u32> = (0..50).collect();
    let row = logits.row(1);
    order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    let logprobs = reference::log_softmax(row);
    let choose = |params: &SamplingParams, output: &[u32], count: usize| {
        let mut sampler = ops.sampler(2, 50).unwrap();
        ops.seat(&mut sampler, 1, params, &[order[0]], output).unwrap();
        let mut one =
            || collect(ops, ops.sample(&x, &[SampleRow { row: 1, seat: 1 }], &mut sampler).unwrap());
        (0..count).map(|_| one().remove(0)).collect::<Vec<_>>()
    };
    let [best, second, third] = [order[0], order[1], order[2]];
    let ban = |token, until| Ban { token, until };
    for (bans, output, expected) in [
        (vec![], 0, [best; 4]),
        (vec![ban(best, 0)], 0, [best; 4]),
        (vec![ban(best, 2)], 0, [second, second, best, best]),
        (vec![ban(best, 2)], 1, [second, best, best, best]),
        (vec![ban(best, 2)], 2, [best; 4]),
        (vec![ban(best, Ban::ALWAYS)], 7, [second; 4]),
        (vec![ban(best, 3), ban(second, 1)], 0, [third, second, second, best]),
        (vec![ban(best, 1), ban(best, 2)], 0, [second, second, best, best]),
        (vec![ban(third, Ban::ALWAYS)], 0, [best; 4]),
    ] {
        let params = SamplingParams { bans, num_top: 1, ..Default::default() };
        let chosen = choose(&params, &vec![third; output], 4);
        assert_eq!(chosen.iter().map(|one| one.token).collect::<Vec<_>>(), expected, "{params:?}");
        // What is reported is the model's own distribution.
        assert!(chosen.iter().all(|one| one.top[0].0 == best));
        assert!(chosen.iter().all(|one| (one.logprob - logprobs[one.token as usize]).abs() < 1e-4));
    }
    // A bias does not outweigh a ban, and draws keep it too.
    let bans: Vec<_> = order[..49].iter().map(|&token| ban(token, 3)).collect();
    for (temperature, logit_bias) in [(0.0, vec![(best, 100.0)]), (1.0, vec![(best, 100.0)]), (5.0, vec![])] {
        for seed in 0..20 {
            let params = SamplingParams {
                temperature,
                seed,
                bans: bans.clone(),
                logit_bias: logit_bias.clone(),
                ..Default::default()
            };
            let chosen: Vec<_> = choose(&params, &[], 3).iter().map(|one| one.token).collect();
            assert_eq!(chosen, [order[49]; 3], "{params:?}");
        }
    }
    let beyond = SamplingParams { bans: vec![ban(50, 1)], ..Default::default() };
    assert!(ops.seat(&mut ops.sampler(1, 50).unwrap(), 0, &beyond, &[], &[]).is_err());
}

/// Tokens that 200 seeds draw, with a prompt and an output of probable tokens.
fn drawn<B: Backend>(ops: &B, params: &SamplingParams) -> Vec<u32> {
    let mut logits = Numbers(7).table(3, 50);
    logits.data.iter_mut().for_each(|logit| *logit *= 4.0);
    let x = mat(ops, &logits);
    let draw = |seed| {
        let mut sampler = ops.sampler(1, 50).unwrap();
        let seen: Vec<u32> = (0..25).collect();
        ops.seat(&mut sampler, 0, &SamplingParams { seed, ..params.clone() }, &seen, &seen).unwrap();
        collect(ops, ops.sample(&x, &[SampleRow { row: 1, seat: 0 }], &mut sampler).unwrap())[0].token
    };
    (0..200).map(draw).collect()
}

macro_rules! check_effects {
    ({ $ops:ident } $(
        $(#[$doc:meta])*
        $name:ident: $type:ty { off: $off:expr, default: $default:expr, draws: $draws:expr, range: $range:ident($($bound:expr),*), example: $example:expr }
    )*) => { $({
        let warm = || SamplingParams { temperature: 1.0, ..Default::default() };
        let with = |value| drawn($ops, &SamplingParams { $name: value, ..warm() });
        assert_ne!(with($example), with($off), "{} has no effect", stringify!($name));
    })* };
}

pub(super) fn every_parameter_has_an_effect<B: Backend>(ops: &B) {
    ::sampling::parameters!(check_effects { ops });
}

/// Tokens across a vocabulary of a real model's size, most probable first, a quarter apart in their logits; the others
/// have next to no probability.
pub(super) fn peaks() -> (Vec<u32>, Table) {
    let vocab = 70_001;
    let order: Vec<u32> = (0..30).map(|i| 7 + 2311 * i).collect();
    let mut logits = Numbers(12).table(1, vocab as usize);
    logits.data.iter_mut().for_each(|x| *x -= 20.0);
    for (i, &token) in order.iter().enumerate() {
        logits.data[token as usize] = 8.0 - 0.25 * i as f32;
    }
    (order, logits)
}

pub(super) fn sampling_of_a_large_vocabulary<B: Backend>(ops: &B) {
    let (order, logits) = peaks();
    check_filters(ops, &logits, &order, None);
}

/// Compares the tokens that each filter keeps of a row of logits with those that it has to. `order` has the tokens that
/// have a probability, under the mask if there is one, most probable first.
pub(super) fn check_filters<B: Backend>(ops: &B, logits: &Table, order: &[u32], mask: Option<&TokenMask>) {
    let vocab = logits.cols;
    let own: Vec<f32> = order.iter().map(|&token| logits.data[token as usize]).collect();
    let probable: Vec<f64> = reference::log_softmax(&own).iter().map(|&p| f64::from(p).exp()).collect();
    let (x, rows) = (wide_mat(ops, logits), 64);
    let all: Vec<_> = (0..rows).map(|seat| SampleRow { row: 0, seat }).collect();
    let masks = vec![mask; rows as usize];
    let warm = SamplingParams { temperature: 1.0, ..Default::default() };
    let kept = |params: SamplingParams| {
        let mut sampler = ops.sampler(rows as usize, vocab).unwrap();
        for seat in 0..rows {
            let params = SamplingParams { seed: u64::from(seat), ..params.clone() };
            ops.seat(&mut sampler, seat, &params, &[], &[]).unwrap();
        }
        let mut draw = || collect(ops, ops.sample_masked(&x, &all, &masks, &mut sampler).unwrap());
        let draws = (0..4).flat_map(|_| draw());
        let mut ranks: Vec<_> = draws.map(|s| order.iter().position(|&t| t == s.token).unwrap()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    };
    let upto = |share: f64, order: &[usize]| {
        let mut kept = Vec::new();
        for &i in order {
            if kept.iter().map(|&i: &usize| probable[i]).sum::<f64>() < share {
                kept.push(i);
            }
        }
        kept.sort_unstable();
        kept
    };
    let by_rank: Vec<usize> = (0..order.len()).collect();
    let least = by_rank.iter().filter(|&&i| probable[i] >= 0.3 * probable[0]).count();
    assert_eq!(kept(SamplingParams { top_k: 5, ..warm.clone() }), [0, 1, 2, 3, 4]);
    assert_eq!(kept(SamplingParams { min_p: 0.3, ..warm.clone() }), by_rank[..least]);
    assert_eq!(kept(SamplingParams { top_p: 0.8, ..warm.clone() }), upto(0.8, &by_rank));
    let entropy: f64 = probable.iter().map(|p| -p * p.ln()).sum();
    let mut typical = by_rank;
    typical.sort_by(|&a, &b| {
        let away = |i: usize| (-probable[i].ln() - entropy).abs();
        away(a).total_cmp(&away(b))
    });
    assert_eq!(kept(SamplingParams { typical_p: 0.5, ..warm }), upto(0.5, &typical));
}

pub(super) fn penalties_over_a_large_vocabulary<B: Backend>(ops: &B) {
    let (order, logits) = peaks();
    let x = wide_mat(ops, &logits);
    let greedy = |params: SamplingParams, prompt: &[u32], output: &[u32]| {
        let mut sampler = ops.sampler(1, logits.cols).unwrap();
        ops.seat(&mut sampler, 0, &params, prompt, output).unwrap();
        collect(ops, ops.sample(&x, &[SampleRow { row: 0, seat: 0 }], &mut sampler).unwrap()).remove(0).token
    };
    let mut prompt: Vec<u32> = (0..3000).map(|i| order[20] + i).collect();
    prompt[2999] = order[0];
    let repeats = SamplingParams { repetition_penalty: 1.5, ..Default::default() };
    assert_eq!(greedy(repeats, &prompt, &[]), order[1], "the end of a long prompt counts");
    let frequent = |penalty| SamplingParams { frequency_penalty: penalty, ..Default::default() };
    assert_eq!(greedy(frequent(0.08), &[], &[order[0]; 3]), order[0]);
    assert_eq!(greedy(frequent(0.09), &[], &[order[0]; 3]), order[1]);
    assert_eq!(greedy(SamplingParams { temperature: 1e-38, ..Default::default() }, &[], &[]), order[0]);
}

/// A device may count to 32,767 only, but neither loses count nor touches other tokens.
pub(super) fn counts_of_seen_tokens_stop_at_the_last<B: Backend>(ops: &B) {
    let (order, logits) = peaks();
    let x = wide_mat(ops, &logits);
    let greedy = |x: &B::Mat, vocab: usize, params: &SamplingParams, output: &[u32]| {
        let mut sampler = ops.sampler(1, vocab).unwrap();
        ops.seat(&mut sampler, 0, params, &[], output).unwrap();
        let mut choose = || ops.sample(x, &[SampleRow { row: 0, seat: 0 }], &mut sampler).unwrap();
        [(); 2].map(|()| collect(ops, choose()).remove(0).token)
    };
    // 32,767 of these are more than the 0.25 to the next token; 40,000 and 70,000 less a power of two are not.
    let frequent = SamplingParams { frequency_penalty: 1e-5, ..Default::default() };
    for count in [32_000, 32_766, 32_767, 32_768, 32_769, 40_000, 65_535, 65_536, 65_537, 70_000, 100_000] {
        let chosen = greedy(&x, logits.cols, &frequent, &vec![order[0]; count]);
        assert_eq!(chosen, [order[1]; 2], "{count} times");
    }
    assert_eq!(greedy(&x, logits.cols, &frequent, &[order[0]; 20_000]), [order[0]; 2]);
    // Its neighbour is not counted, and a token that was never in the prompt is not penalized as if it were.
    let few = Table { cols: 8, data: vec![0.0, 0.0, 0.0, 0.0, 1.0, 0.9, 0.8, 0.0] };
    let x = wide_mat(ops, &few);
    for count in [32_768, 40_000, 65_536, 70_000, 140_000] {
        let present = SamplingParams { presence_penalty: 2.0, ..Default::default() };
        assert_eq!(greedy(&x, 8, &present, &vec![4; count])[0], 5, "{count} times");
    }
}

/// More rows than one launch takes.
pub(super) fn sampling_and_scoring_of_many_rows<B: Backend>(ops: &B) {
    let (rows, vocab) = (1100, 700);
    let mut logits = Numbers(17).table(rows, vocab);
    let best = |row: usize| row * 7 % vocab;
    (0..rows).for_each(|row| logits.data[row * vocab + best(row)] = 9.0);
    let x = wide_mat(ops, &logits);
    let mut sampler = ops.sampler(rows, vocab).unwrap();
    let params = SamplingParams { num_top: 2, ..Default::default() };
    (0..rows as u32).for_each(|seat| ops.seat(&mut sampler, seat, &params, &[], &[]).unwrap());
    // Seats in another order than rows.
    let places: Vec<_> = (0..rows as u32).map(|row| SampleRow { row, seat: rows as u32 - 1 - row }).collect();
    let sampled = collect(ops, ops.sample(&x, &places, &mut sampler).unwrap());
    assert_eq!(sampled.len(), rows);
    for (row, sampled) in sampled.iter().enumerate() {
        assert_eq!((sampled.seat as usize, sampled.token as usize), (rows - 1 - row, best(row)));
        assert_eq!((sampled.top.len(), sampled.top[0].0 as usize), (2, best(row)));
    }
    let targets: Vec<(u32, u32)> = (0..rows as u32).map(|row| (row, (row + 1) % vocab as u32)).collect();
    let scored = collect(ops, ops.score(&x, &targets, 1).unwrap());
    for (row, scored) in scored.iter().enumerate() {
        let expected = reference::log_softmax(logits.row(row))[(row + 1) % vocab];
        assert!((scored.logprob - expected).abs() < 1e-3, "row {row}");
        assert_eq!(scored.top[0].0 as usize, best(row));
    }
}

pub(super) fn draws_depend_on_their_seat_alone<B: Backend>(ops: &B) {
    let (_, logits) = peaks();
    let x = wide_mat(ops, &logits);
    let others = [
        SamplingParams::default(),
        SamplingParams { temperature: 2.0, top_p: 0.5, seed: 3, ..Default::default() },
        SamplingParams { temperature: 0.7, repetition_penalty: 1.2, seed: 77, ..Default::default() },
    ];
    let params = SamplingParams { temperature: 1.0, top_p: 0.95, seed: 77, ..Default::default() };
    let draws = |seat: u32, seats: u32| {
        let mut sampler = ops.sampler(seats as usize, logits.cols).unwrap();
        for other in 0..seats {
            let params = if other == seat { &params } else { &others[other as usize % 3] };
            ops.seat(&mut sampler, other, params, &[], &[]).unwrap();
        }
        let rows: Vec<_> = (0..seats).rev().map(|seat| SampleRow { row: 0, seat }).collect();
        let mut draw = || collect(ops, ops.sample(&x, &rows, &mut sampler).unwrap());
        let own = (0..12).map(|_| draw().into_iter().find(|s| s.seat == seat).unwrap().token);
        own.collect::<Vec<_>>()
    };
    let alone = draws(0, 1);
    assert!(alone.iter().any(|token| token != &alone[0]), "draws differ");
    assert_eq!(draws(41, 64), alone);
}

pub(super) fn sampling_among_thousands_of_tokens<B: Backend>(ops: &B) {
    let vocab = 20_001;
    // Every token is a ten-thousandth below the one before it.
    let rank = |token: u32| token as usize * 7919 % vocab;
    let data = (0..vocab as u32).map(|token| -1e-4 * rank(token) as f32).collect();
    let (x, rows) = (wide_mat(ops, &Table { cols: vocab, data }), 200);
    let last = |params: SamplingParams| {
        let mut sampler = ops.sampler(rows as usize, vocab).unwrap();
        let all: Vec<_> = (0..rows).map(|seat| SampleRow { row: 0, seat }).collect();
        for seat in 0..rows {
            let params = SamplingParams { temperature: 1.0, seed: u64::from(seat), ..params.clone() };
            ops.seat(&mut sampler, seat, &params, &[], &[]).unwrap();
        }
        let sampled = collect(ops, ops.sample(&x, &all, &mut sampler).unwrap());
        sampled.iter().map(|sampled| rank(sampled.token)).max().unwrap()
    };
    // e^-2 of the mass is beyond the last token: 0.9 of it is reached at -ln(1 - 0.9 (1 - e^-2)) = 1.506.
    assert!((18_000..vocab).contains(&last(SamplingParams::default())));
    assert!((14_000..15_070).contains(&last(SamplingParams { top_p: 0.9, ..Default::default() })));
    assert!((6_500..6_940).contains(&last(SamplingParams { min_p: 0.5, ..Default::default() })));
    assert!((8_500..9_000).contains(&last(SamplingParams { top_k: 9_000, ..Default::default() })));
}

/// Every way to choose: the most probable token, and draws through each filter.
fn ways() -> Vec<SamplingParams> {
    let warm = SamplingParams { temperature: 0.7, ..Default::default() };
    vec![
        SamplingParams::default(),
        warm.clone(),
        SamplingParams { top_k: 3, ..warm.clone() },
        SamplingParams { top_p: 0.9, ..warm.clone() },
        SamplingParams { typical_p: 0.9, ..warm.clone() },
        SamplingParams { min_p: 0.1, ..warm.clone() },
        SamplingParams { top_k: 9, top_p: 0.9, typical_p: 0.9, min_p: 0.1, ..warm },
    ]
}

/// Eight tokens chosen from one row of logits.
fn chosen<B: Backend>(ops: &B, logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let x = wide_mat(ops, &Table { cols: logits.len(), data: logits.to_vec() });
    let mut sampler = ops.sampler(1, logits.len()).unwrap();
    ops.seat(&mut sampler, 0, params, &[], &[]).unwrap();
    let mut choose = || ops.sample(&x, &[SampleRow { row: 0, seat: 0 }], &mut sampler).unwrap();
    (0..8).map(|_| collect(ops, choose()).remove(0).token).collect()
}

/// A row whose NaN and negative infinity are at its ends and between: all but two tokens, at 40 and 1001.
fn holes() -> Vec<f32> {
    let mut logits: Vec<f32> =
        (0..1003).map(|i| if i % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY }).collect();
    (logits[40], logits[1001]) = (1.0, 1.5);
    logits
}

pub(super) fn tokens_without_a_probability_are_never_chosen<B: Backend>(ops: &B) {
    let logits = holes();
    for params in ways() {
        let tokens = chosen(ops, &logits, &SamplingParams { top_k: 0, ..params.clone() });
        assert!(tokens.iter().all(|token| [40, 1001].contains(token)), "{params:?}: {tokens:?}");
    }
    assert_eq!(chosen(ops, &logits, &SamplingParams::default()), [1001; 8]);
    let mut sampler = ops.sampler(1, logits.len()).unwrap();
    ops.seat(&mut sampler, 0, &SamplingParams::default(), &[], &[]).unwrap();
    let x = wide_mat(ops, &Table { cols: logits.len(), data: logits });
    let sampled = ops.sample(&x, &[SampleRow { row: 0, seat: 0 }], &mut sampler).unwrap();
    let logprob = -(-0.5_f32).exp().ln_1p();
    assert!((collect(ops, sampled)[0].logprob - logprob).abs() < 1e-4, "of the tokens that have one");
    let infinite: Vec<f32> = (0..50).map(|i| if i == 31 { f32::INFINITY } else { i as f32 }).collect();
    assert_eq!(chosen(ops, &infinite, &SamplingParams::default()), [31; 8]);
    for logits in [[f32::NAN; 50], [f32::NEG_INFINITY; 50]] {
        assert_eq!(chosen(ops, &logits, &SamplingParams::default()), [0; 8], "there is no other");
    }
}

/// Logits that are no distribution.
pub(super) fn any_logits_give_a_token<B: Backend>(ops: &B) {
    let mut infinite = Numbers(9).table(1, 70).data;
    (infinite[3], infinite[64]) = (f32::INFINITY, f32::INFINITY);
    infinite[0] = f32::NAN;
    for params in ways() {
        assert_eq!(chosen(ops, &infinite, &params), [3; 8], "{params:?}");
        assert_eq!(chosen(ops, &[f32::NAN; 70], &params), [0; 8], "{params:?}");
        assert_eq!(chosen(ops, &[f32::NEG_INFINITY; 70], &params), [0; 8], "{params:?}");
        let tokens = chosen(ops, &holes(), &params);
        assert!(tokens.iter().all(|token| [40, 1001].contains(token)), "{params:?}: {tokens:?}");
        let mut extreme = vec![f32::MIN; 70];
        extreme[20] = f32::MAX;
        assert_eq!(chosen(ops, &extreme, &params), [20; 8], "{params:?}");
    }
    let overflowing =
        SamplingParams { repetition_penalty: 1e-39, min_p: 0.1, temperature: 1.0, ..Default::default() };
    let mut sampler = ops.sampler(1, 70).unwrap();
    ops.seat(&mut sampler, 0, &overflowing, &[5], &[]).unwrap();
    let x = wide_mat(ops, &Table { cols: 70, data: vec![2.0; 70] });
    let sampled = ops.sample(&x, &[SampleRow { row: 0, seat: 0 }], &mut sampler).unwrap();
    assert_eq!(collect(ops, sampled)[0].token, 5);
}
