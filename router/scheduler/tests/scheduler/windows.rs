//! KV blocks that lie before the attention window. What a row reads, and that no block of its window is overwritten, is
//! checked by the simulated shard.

use scheduler::{Limits, RequestId, RopeScaling, SubmitError, kv_positions};

use crate::{
    shard::plain,
    world::{World, limits, prompt, request},
};

fn windowed(kv_window: u32) -> Limits {
    Limits { kv_window, ..limits() }
}

#[test]
fn a_long_sequence_holds_its_window_and_the_rows_of_a_step() {
    // Window, positions in a block, prompt rows of a step, length of the prompt, tokens to generate.
    for (window, size, rows, len, answer) in [
        (1_u32, 4, 16_u32, 100, 100),
        (2, 1, 8, 60, 90),
        (3, 4, 16, 5, 300),
        (4, 4, 16, 200, 40),
        (5, 4, 1, 50, 200),
        (8, 4, 16, 400, 400),
        (9, 16, 32, 500, 100),
        (16, 16, 16, 17, 600),
        (17, 3, 7, 301, 59),
        (40, 8, 24, 1000, 10),
        (64, 16, 1, 90, 500),
        (100, 16, 32, 99, 300),
    ] {
        let most = (window + rows - 1).div_ceil(size) + 1;
        let limits = Limits {
            block_size: size,
            num_blocks: most,
            max_prefill_rows: Some(rows),
            prefix_caching: false,
            ..windowed(window)
        };
        let mut world = World::new(limits);
        world.submit(request(1, 0, prompt(1, len), answer)).unwrap();
        let mut held = 0;
        while let Some(plan) = world.plan() {
            held = held.max(most as usize - world.scheduler.stats().free_blocks);
            let Some(rows) = plan.rows.first() else { break };
            let needed = (rows.position + 1).saturating_sub(window) / size;
            assert_eq!(rows.released_blocks, needed, "window {window}, position {}", rows.position);
            world.run();
        }
        world.run_to_end();
        let all = (len + answer as usize).div_ceil(size as usize);
        assert!(held < all, "{held} of {all} blocks, window {window}");
        assert_eq!(world.scheduler.stats().preemptions, 0, "window {window}");
        assert_eq!(world.finished, [RequestId(1)]);
    }
}

#[test]
fn a_model_with_a_layer_without_a_window_keeps_all_blocks() {
    for len in [1, 3, 4, 5, 15, 16, 17, 40, 100, 200] {
        let mut world = World::new(Limits { prefix_caching: false, ..limits() });
        world.submit(request(1, 0, prompt(1, len), 30)).unwrap();
        while let Some(plan) = world.plan() {
            let Some(rows) = plan.rows.first() else { break };
            assert_eq!(rows.released_blocks, 0);
            let held = 64 - world.scheduler.stats().free_blocks;
            assert_eq!(held, (rows.position + rows.rows).div_ceil(4) as usize);
            world.run();
        }
        world.run_to_end();
    }
}

#[test]
fn only_the_window_has_to_fit_into_memory() {
    // Blocks of 4 positions, the window, and the positions that one sequence can fill; none: any number.
    for (num_blocks, window, positions) in [
        (4, 0, Some(16)),
        (4, 1, None),
        (1, 1, None),
        (1, 2, Some(4)),
        (2, 2, None),
        (2, 5, None),
        (2, 6, Some(8)),
        (3, 9, None),
        (3, 10, Some(12)),
        (4, 13, None),
        (4, 14, Some(16)),
        (4, 100, Some(16)),
        (26, 100, None),
    ] {
        let case = format!("{num_blocks} blocks, window {window}");
        assert_eq!(kv_positions(num_blocks, 4, window), positions.unwrap_or(u64::MAX), "{case}");
        let longest = positions.unwrap_or(300) as usize;
        let limits = Limits { num_blocks, ..windowed(window) };
        let mut world = World::new(limits);
        world.submit(request(1, 0, prompt(1, longest / 2), (longest - longest / 2) as u32 + 1)).unwrap();
        world.run_to_end();
        assert_eq!(world.finished, [RequestId(1)], "{case}");
        if let Some(capacity) = positions {
            let too_long = world.submit(request(2, 0, prompt(1, longest), 2));
            assert_eq!(too_long, Err(SubmitError::TooLong { positions: capacity + 1, capacity }), "{case}");
        }
    }
}

#[test]
fn a_cached_prefix_needs_the_blocks_of_its_window_alone() {
    // Length of the prompt that comes again, and what of it comes from the cache of 12 blocks of 4. The window is 8.
    for (len, hit) in
        [(3, 0), (5, 4), (9, 8), (13, 12), (20, 16), (21, 20), (33, 32), (41, 40), (80, 76), (100, 96)]
    {
        let mut world = World::new(Limits { num_blocks: 12, ..windowed(8) });
        assert_eq!(world.cached(request(1, 0, prompt(1, len), 1)), 0, "{len}");
        assert_eq!(world.cached(request(2, 0, prompt(1, len), 1)), hit, "{len}");
        // Another prompt takes all blocks but those that were used last; or these, too.
        assert_eq!(world.cached(request(3, 0, prompt(2, 17), 1)), 0);
        assert_eq!(world.cached(request(4, 0, prompt(1, len), 1)), hit, "{len}");
        assert_eq!(world.cached(request(5, 0, prompt(3, 200), 1)), 0);
        assert_eq!(world.cached(request(6, 0, prompt(1, len), 1)), 0, "{len}");
    }
}

#[test]
fn a_prefix_is_found_behind_blocks_that_are_gone() {
    let mut world = World::new(Limits { num_blocks: 8, ..windowed(8) });
    // 100 positions go through 8 blocks: the first ones are gone long before the end.
    world.cached(request(1, 0, prompt(1, 100), 1));
    world.submit(request(2, 0, prompt(1, 100), 20)).unwrap();
    let plan = world.plan().unwrap();
    let rows = &plan.rows[0];
    assert_eq!((rows.position, rows.rows, rows.released_blocks, rows.new_blocks.len()), (96, 4, 22, 3));
    world.run_to_end();
    // A longer prompt that begins with it, and with its answer.
    let longer = [prompt(1, 100), plain(&request(0, 0, prompt(1, 100), 20), RopeScaling::Fixed)].concat();
    assert_eq!(world.cached(request(3, 0, [longer, prompt(5, 30)].concat(), 1)), 116);
    // One that ends where blocks of its window are gone.
    assert_eq!(world.cached(request(4, 0, prompt(1, 50), 1)), 0);
}

#[test]
fn sequences_with_windows_are_preempted_and_resume() {
    // Blocks, the window, length of prompts, and of answers.
    for (num_blocks, window, len, answer) in [
        (10, 24, 6, 60),
        (12, 28, 6, 80),
        (12, 32, 9, 70),
        (13, 40, 6, 100),
        (14, 40, 10, 90),
        (16, 48, 8, 100),
        (16, 30, 5, 90),
        (20, 64, 6, 120),
        (11, 36, 7, 70),
        (18, 50, 12, 80),
    ] {
        for prefix_caching in [false, true] {
            let limits = Limits { num_blocks, prefix_caching, max_prefill_rows: Some(4), ..windowed(window) };
            let mut world = World::new(limits);
            for id in 0..10 {
                world.submit(request(id, 0, prompt(id, len + id as usize), answer + id as u32)).unwrap();
            }
            world.run_to_end();
            let stats = world.scheduler.stats();
            assert!(stats.preemptions > 0, "{num_blocks} blocks, window {window}: nobody gives way");
            assert_eq!(world.finished.len(), 10);
        }
    }
}
