//! Metrics of the engine.

use std::time::{Duration, Instant};

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};
use scheduler::Stats;

/// The engine's metrics.
pub(crate) struct EngineMetrics {
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) cached_tokens: Counter,
    pub(crate) input_length: Histogram,
    output_length: Histogram,
    pub(crate) queue_duration: Histogram,
    pub(crate) first_token: Histogram,
    pub(crate) max_new_tokens: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    time_per_output_token: Histogram,
    mean_time_per_token: Histogram,
    pub(crate) step_duration: Histogram,
    pub(crate) mask_duration: Histogram,
    pub(crate) step_rows: Histogram,
    pub(crate) load_time: Histogram,
    pub(crate) slots_filled: Counter,
    pub(crate) slots_failed: Counter,
    pub(crate) sessions: Counter,
    pub(crate) session_failures: Counter,
    pub(crate) ranks: Gauge,
    pub(crate) oldest_step: Gauge,
    inter_token: Histogram,
    preemptions: Counter,
    slots_evicted: Counter,
    idle_slot_steps: Counter,
    gauges: SchedulerGauges,
}

/// Gauges of the scheduler's present state.
struct SchedulerGauges {
    waiting: Gauge,
    oldest_waiting: Gauge,
    running: Gauge,
    preempted: Gauge,
    free_blocks: Gauge,
    cached_blocks: Gauge,
    used_blocks: Gauge,
    used_ratio: Gauge,
    ready_slots: Gauge,
    loading_slots: Gauge,
    empty_slots: Gauge,
}

/// Totals that the ranks have.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Capacity {
    pub(crate) num_blocks: u32,
    pub(crate) num_slots: u32,
}

/// When a sequence got where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SequenceTimes {
    /// Its first rows were planned.
    pub(crate) planned: Instant,
    /// Its first token came.
    pub(crate) first: Instant,
    /// Its last token came.
    pub(crate) last: Instant,
}

impl EngineMetrics {
    /// Makes the handles with the current recorder.
    pub(super) fn new() -> EngineMetrics {
        describe_sequences();
        describe_steps();
        EngineMetrics {
            prompt_tokens: counter!("lorax_prompt_tokens_total"),
            generated_tokens: counter!("lorax_generated_tokens_total"),
            cached_tokens: counter!("lorax_cached_prompt_tokens_total"),
            input_length: histogram!("lorax_request_input_length"),
            output_length: histogram!("lorax_request_generated_tokens"),
            queue_duration: histogram!("lorax_request_queue_duration"),
            first_token: histogram!("lorax_request_first_token_duration"),
            max_new_tokens: histogram!("lorax_request_max_new_tokens"),
            prefill: histogram!("lorax_request_prefill_duration"),
            decode: histogram!("lorax_request_decode_duration"),
            inference: histogram!("lorax_request_inference_duration"),
            time_per_output_token: histogram!("lorax_request_time_per_output_token_duration"),
            mean_time_per_token: histogram!("lorax_request_mean_time_per_token_duration"),
            inter_token: histogram!("lorax_request_inter_token_duration"),
            step_duration: histogram!("lorax_step_duration_seconds"),
            mask_duration: histogram!("lorax_mask_duration_seconds"),
            step_rows: histogram!("lorax_step_rows"),
            load_time: histogram!("lorax_adapter_load_seconds"),
            slots_filled: counter!("lorax_adapter_loads_total", "result" => "ready"),
            slots_failed: counter!("lorax_adapter_loads_total", "result" => "failed"),
            sessions: counter!("lorax_sessions_total"),
            session_failures: counter!("lorax_session_failures_total"),
            preemptions: counter!("lorax_preemptions_total"),
            slots_evicted: counter!("lorax_adapter_slot_evictions_total"),
            idle_slot_steps: counter!("lorax_adapter_slot_idle_steps_total"),
            ranks: gauge!("lorax_connected_ranks"),
            oldest_step: gauge!("lorax_oldest_step_age_seconds"),
            gauges: SchedulerGauges {
                waiting: gauge!("lorax_queue_length"),
                oldest_waiting: gauge!("lorax_queue_oldest_age_seconds"),
                running: gauge!("lorax_batch_current_size"),
                preempted: gauge!("lorax_preempted_sequences"),
                free_blocks: gauge!("lorax_kv_blocks", "state" => "free"),
                cached_blocks: gauge!("lorax_kv_blocks", "state" => "cached"),
                used_blocks: gauge!("lorax_kv_blocks", "state" => "used"),
                used_ratio: gauge!("lorax_kv_use_ratio"),
                ready_slots: gauge!("lorax_adapter_slots", "state" => "ready"),
                loading_slots: gauge!("lorax_adapter_slots", "state" => "loading"),
                empty_slots: gauge!("lorax_adapter_slots", "state" => "empty"),
            },
        }
    }

    /// Publishes what the scheduler knows. `before` is what it knew at the last call in this session.
    pub(crate) fn publish(&self, now: Duration, stats: &Stats, before: &Stats, capacity: Capacity) {
        let gauges = &self.gauges;
        let waited = stats.waiting_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
        let (blocks, slots) = (capacity.num_blocks as usize, capacity.num_slots as usize);
        let used = blocks.saturating_sub(stats.free_blocks + stats.cached_blocks);
        gauges.oldest_waiting.set(waited);
        gauges.used_ratio.set(used as f64 / blocks.max(1) as f64);
        for (gauge, value) in [
            (&gauges.waiting, stats.waiting),
            (&gauges.running, stats.running),
            (&gauges.preempted, stats.preempted),
            (&gauges.free_blocks, stats.free_blocks),
            (&gauges.cached_blocks, stats.cached_blocks),
            (&gauges.used_blocks, used),
            (&gauges.ready_slots, stats.resident_adapters),
            (&gauges.loading_slots, stats.loading_adapters),
            (&gauges.empty_slots, slots.saturating_sub(stats.resident_adapters + stats.loading_adapters)),
        ] {
            gauge.set(value as f64);
        }
        self.preemptions.increment(stats.preemptions - before.preemptions);
        self.slots_evicted.increment(stats.adapter_evictions - before.adapter_evictions);
        self.idle_slot_steps.increment(stats.idle_slot_steps - before.idle_slot_steps);
    }

    /// Counts a sequence that ran to its end.
    pub(crate) fn generated(&self, times: SequenceTimes, tokens: usize) {
        self.output_length.record(tokens as f64);
        let SequenceTimes { planned, first, last } = times;
        let (inference, decode) = (last.duration_since(planned), last.duration_since(first));
        self.prefill.record(first.duration_since(planned));
        self.decode.record(decode);
        self.inference.record(inference);
        self.mean_time_per_token.record(inference.as_secs_f64() / tokens.max(1) as f64);
        if tokens > 1 {
            self.time_per_output_token.record(decode.as_secs_f64() / (tokens - 1) as f64);
        }
    }

    /// Resets all gauges, because the session is over.
    pub(crate) fn clear(&self) {
        self.publish(Duration::ZERO, &Stats::default(), &Stats::default(), Capacity::default());
        self.ranks.set(0.0);
        self.oldest_step.set(0.0);
    }

    /// Begins to count the tokens of a step's result.
    pub(crate) fn tokens(&self, now: Instant) -> StepTokens<'_> {
        StepTokens { metrics: self, now, tokens: 0, wait: Duration::ZERO, waited: 0 }
    }
}

/// The tokens of one step. Nearly all of their sequences have had their last token at the same time, so that
/// durations are recorded together.
pub(crate) struct StepTokens<'a> {
    metrics: &'a EngineMetrics,
    now: Instant,
    tokens: u64,
    wait: Duration,
    waited: usize,
}

impl StepTokens<'_> {
    /// Time at which the result came.
    pub(crate) fn now(&self) -> Instant {
        self.now
    }

    /// Counts a token of a sequence that had its last one at `last`.
    pub(crate) fn add(&mut self, last: Option<Instant>) {
        self.tokens += 1;
        let Some(last) = last else { return };
        let wait = self.now.duration_since(last);
        if wait != self.wait {
            self.record_waits();
            self.wait = wait;
        }
        self.waited += 1;
    }

    fn record_waits(&mut self) {
        if self.waited > 0 {
            self.metrics.inter_token.record_many(self.wait, self.waited);
        }
        self.waited = 0;
    }
}

impl Drop for StepTokens<'_> {
    fn drop(&mut self) {
        self.record_waits();
        self.metrics.generated_tokens.increment(self.tokens);
    }
}

fn describe_sequences() {
    describe_counter!("lorax_prompt_tokens_total", "Prompt tokens of sequences that have begun to run.");
    describe_counter!("lorax_generated_tokens_total", "Tokens generated.");
    describe_counter!("lorax_cached_prompt_tokens_total", "Prompt tokens taken from the prefix cache.");
    describe_histogram!("lorax_request_input_length", "Tokens of a sequence's prompt.");
    describe_histogram!("lorax_request_generated_tokens", "Tokens generated for a sequence.");
    describe_histogram!(
        "lorax_request_queue_duration",
        "Seconds that a sequence waited until its first rows ran."
    );
    describe_histogram!(
        "lorax_request_first_token_duration",
        "Seconds from the head of a request to its first token."
    );
    describe_histogram!("lorax_request_inter_token_duration", "Seconds between two tokens of a sequence.");
    describe_histogram!("lorax_request_max_new_tokens", "Tokens that a sequence may generate.");
    describe_histogram!(
        "lorax_request_prefill_duration",
        "Seconds from the planning of a sequence's first rows to its first token."
    );
    describe_histogram!(
        "lorax_request_decode_duration",
        "Seconds from a sequence's first token to its last."
    );
    describe_histogram!(
        "lorax_request_inference_duration",
        "Seconds from the planning of a sequence's first rows to its last token."
    );
    describe_histogram!(
        "lorax_request_time_per_output_token_duration",
        "Seconds that each token of a sequence after its first took in the mean."
    );
    describe_histogram!(
        "lorax_request_mean_time_per_token_duration",
        "Seconds of a sequence's prefill and decode, divided by its tokens."
    );
}

fn describe_steps() {
    describe_histogram!("lorax_step_duration_seconds", "Seconds that the forward pass of a step took.");
    describe_histogram!(
        "lorax_mask_duration_seconds",
        "Seconds from the last token that the masks of a step depend on until they were sent."
    );
    describe_histogram!("lorax_step_rows", "Rows of a step.");
    describe_histogram!(
        "lorax_adapter_load_seconds",
        "Seconds from the step that loads an adapter into a slot until it was there on all ranks."
    );
    describe_counter!("lorax_adapter_loads_total", "Loads of adapters into slots that have ended, by how.");
    describe_counter!("lorax_sessions_total", "Sessions with the shards that have begun.");
    describe_counter!("lorax_session_failures_total", "Sessions with the shards that have failed.");
    describe_counter!(
        "lorax_preemptions_total",
        "Sequences that gave up their blocks, to be computed again."
    );
    describe_counter!("lorax_adapter_slot_evictions_total", "Adapters evicted from device slots.");
    describe_counter!(
        "lorax_adapter_slot_idle_steps_total",
        "Steps that a device slot had no work in, beside the first of each time, while requests waited for slots."
    );
    describe_gauge!("lorax_connected_ranks", "Shards in the present session.");
    describe_gauge!("lorax_oldest_step_age_seconds", "Age of the oldest step that has not been answered.");
    describe_gauge!("lorax_queue_length", "Sequences that wait to be admitted.");
    describe_gauge!(
        "lorax_queue_oldest_age_seconds",
        "Age of the oldest sequence that waits to be admitted."
    );
    describe_gauge!("lorax_batch_current_size", "Sequences that run.");
    describe_gauge!("lorax_preempted_sequences", "Sequences that wait to be computed again.");
    describe_gauge!("lorax_kv_blocks", "Blocks of the KV cache, by state.");
    describe_gauge!("lorax_kv_use_ratio", "Share of the KV cache's blocks that sequences use, from 0 to 1.");
    describe_gauge!("lorax_adapter_slots", "Device slots of adapters, by state.");
}
