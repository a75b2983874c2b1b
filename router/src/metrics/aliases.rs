//! Other servers' names for what is recorded, made of the same figures when the page is read.

use config::MetricNames;

use super::{
    bounds::{VLLM_FIRST_TOKEN, VLLM_REQUEST, VLLM_STEP, VLLM_TOKEN, is_vllm_tokens},
    page::{Families, Family, Series, label},
};

/// What the labels of other sets tell of the model.
pub(super) struct Labels<'a> {
    /// The name of the base model.
    pub(super) model: &'a str,
    /// Tokens of the longest request; `None` while the model is not known.
    pub(super) max_tokens: Option<usize>,
}

impl Labels<'_> {
    /// The labels that all series of vLLM's names have.
    pub(super) fn vllm(&self) -> String {
        format!("{},engine=\"0\"", label("model_name", self.model))
    }
}

/// Another name for sums of series of the server's own.
struct Sums {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    /// Labels, and the series that are added up.
    series: &'static [(&'static str, &'static [&'static str])],
}

/// Another name for a histogram of the server's own.
struct Distribution {
    name: &'static str,
    of: &'static str,
    bounds: Bounds,
}

/// The bounds of the server's own that a set of names has.
#[derive(Clone, Copy)]
enum Bounds {
    These(&'static [f64]),
    Tokens,
}

impl Bounds {
    fn have(self, bound: f64, labels: &Labels<'_>) -> bool {
        match self {
            Bounds::These(bounds) => bounds.contains(&bound),
            Bounds::Tokens => is_vllm_tokens(bound, labels.max_tokens.unwrap_or(usize::MAX)),
        }
    }
}

const fn sum(
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    series: &'static [(&'static str, &'static [&'static str])],
) -> Sums {
    Sums { name, kind, help, series }
}

const fn distribution(name: &'static str, of: &'static str, bounds: Bounds) -> Distribution {
    Distribution { name, of, bounds }
}

const VLLM_SUMS: [Sums; 12] = [
    sum("vllm:num_requests_running", "gauge", "Sequences that run.", &[("", &["lorax_batch_current_size"])]),
    sum(
        "vllm:num_requests_waiting",
        "gauge",
        "Sequences that wait to be admitted, or to be computed again.",
        &[("", &["lorax_queue_length", "lorax_preempted_sequences"])],
    ),
    sum(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the KV cache's blocks that sequences use, from 0 to 1.",
        &[("", &["lorax_kv_use_ratio"])],
    ),
    sum(
        "vllm:num_preemptions_total",
        "counter",
        "Sequences that gave up their blocks, to be computed again.",
        &[("", &["lorax_preemptions_total"])],
    ),
    sum(
        "vllm:prompt_tokens_total",
        "counter",
        "Prompt tokens of sequences that have begun to run.",
        &[("", &["lorax_prompt_tokens_total"])],
    ),
    sum(
        "vllm:generation_tokens_total",
        "counter",
        "Tokens generated.",
        &[("", &["lorax_generated_tokens_total"])],
    ),
    sum(
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prompt tokens that were looked for in the prefix cache.",
        &[("", &["lorax_prompt_tokens_total"])],
    ),
    sum(
        "vllm:prefix_cache_hits_total",
        "counter",
        "Prompt tokens taken from the prefix cache.",
        &[("", &["lorax_cached_prompt_tokens_total"])],
    ),
    sum(
        "vllm:num_gpu_loaded_lora_adapters",
        "gauge",
        "Adapters in slots, ready.",
        &[("", &["lorax_adapter_slots{state=\"ready\"}"])],
    ),
    sum("vllm:max_gpu_lora_adapters", "gauge", "Slots of adapters.", &[("", &["lorax_adapter_slots"])]),
    sum(
        "vllm:num_cpu_loaded_lora_adapters",
        "gauge",
        "Adapters in host memory.",
        &[("", &["lorax_adapter_tier_copies{tier=\"host\"}"])],
    ),
    sum(
        "vllm:request_success_total",
        "counter",
        "Requests that have ended, by how.",
        &[
            (
                "finished_reason=\"stop\"",
                &["lorax_requests_total{end=\"eos_token\"}", "lorax_requests_total{end=\"stop_sequence\"}"],
            ),
            ("finished_reason=\"length\"", &["lorax_requests_total{end=\"length\"}"]),
            ("finished_reason=\"abort\"", &["lorax_requests_total{end=\"cancelled\"}"]),
            (
                "finished_reason=\"error\"",
                &["lorax_requests_total{end=\"generation\"}", "lorax_requests_total{end=\"unavailable\"}"],
            ),
        ],
    ),
];

const VLLM_DISTRIBUTIONS: [Distribution; 16] = [
    distribution(
        "vllm:time_to_first_token_seconds",
        "lorax_request_first_token_duration",
        Bounds::These(&VLLM_FIRST_TOKEN),
    ),
    distribution(
        "vllm:inter_token_latency_seconds",
        "lorax_request_inter_token_duration",
        Bounds::These(&VLLM_TOKEN),
    ),
    // The older name of the same.
    distribution(
        "vllm:time_per_output_token_seconds",
        "lorax_request_inter_token_duration",
        Bounds::These(&VLLM_TOKEN),
    ),
    distribution(
        "vllm:request_time_per_output_token_seconds",
        "lorax_request_time_per_output_token_duration",
        Bounds::These(&VLLM_TOKEN),
    ),
    distribution("vllm:e2e_request_latency_seconds", "lorax_request_duration", Bounds::These(&VLLM_REQUEST)),
    distribution(
        "vllm:request_queue_time_seconds",
        "lorax_request_queue_duration",
        Bounds::These(&VLLM_REQUEST),
    ),
    distribution(
        "vllm:request_inference_time_seconds",
        "lorax_request_inference_duration",
        Bounds::These(&VLLM_REQUEST),
    ),
    distribution(
        "vllm:request_prefill_time_seconds",
        "lorax_request_prefill_duration",
        Bounds::These(&VLLM_REQUEST),
    ),
    distribution(
        "vllm:request_decode_time_seconds",
        "lorax_request_decode_duration",
        Bounds::These(&VLLM_REQUEST),
    ),
    distribution(
        "vllm:lora_adapter_load_seconds",
        "lorax_adapter_load_seconds",
        Bounds::These(&VLLM_FIRST_TOKEN),
    ),
    distribution("vllm:request_prompt_tokens", "lorax_request_input_length", Bounds::Tokens),
    distribution("vllm:request_generation_tokens", "lorax_request_generated_tokens", Bounds::Tokens),
    distribution("vllm:request_params_max_tokens", "lorax_request_max_new_tokens", Bounds::Tokens),
    distribution("vllm:request_max_num_generation_tokens", "lorax_request_generated_tokens", Bounds::Tokens),
    // The older name of the same.
    distribution("vllm:max_num_generation_tokens", "lorax_request_generated_tokens", Bounds::Tokens),
    distribution("vllm:iteration_tokens_total", "lorax_step_rows", Bounds::These(&VLLM_STEP)),
];

/// LoRAX's names that are not the server's own.
const LEGACY_SUMS: [Sums; 3] = [
    sum("lorax_request_count", "counter", "Requests that have ended.", &[("", &["lorax_requests_total"])]),
    sum(
        "lorax_request_success",
        "counter",
        "Requests that were answered.",
        &[(
            "",
            &[
                "lorax_requests_total{end=\"length\"}",
                "lorax_requests_total{end=\"eos_token\"}",
                "lorax_requests_total{end=\"stop_sequence\"}",
            ],
        )],
    ),
    sum(
        "lorax_request_failure",
        "counter",
        "Requests that were not answered, by why.",
        &[
            ("err=\"overloaded\"", &["lorax_requests_total{end=\"overloaded\"}"]),
            ("err=\"validation\"", &["lorax_requests_total{end=\"validation\"}"]),
            ("err=\"load_adapter\"", &["lorax_requests_total{end=\"adapter\"}"]),
            ("err=\"dropped\"", &["lorax_requests_total{end=\"cancelled\"}"]),
            (
                "err=\"generation\"",
                &["lorax_requests_total{end=\"generation\"}", "lorax_requests_total{end=\"unavailable\"}"],
            ),
        ],
    ),
];

/// LoRAX's names that are also the server's own: these are one metric, which either set has.
const LEGACY_SHARED: [&str; 10] = [
    "lorax_request_duration",
    "lorax_request_validation_duration",
    "lorax_request_queue_duration",
    "lorax_request_inference_duration",
    "lorax_request_mean_time_per_token_duration",
    "lorax_request_input_length",
    "lorax_request_generated_tokens",
    "lorax_request_max_new_tokens",
    "lorax_queue_length",
    "lorax_batch_current_size",
];

/// The metrics of these sets, but the server's own.
pub(super) fn of(native: &Families, sets: &[MetricNames], labels: &Labels<'_>) -> Families {
    let mut families = Vec::new();
    if sets.contains(&MetricNames::Vllm) {
        let common = labels.vllm();
        families.extend(VLLM_SUMS.iter().map(|sums| sums.of(native, &common)));
        families.extend(VLLM_DISTRIBUTIONS.iter().map(|alias| alias.of(native, labels)));
    }
    if sets.contains(&MetricNames::Legacy) {
        families.extend(LEGACY_SUMS.iter().map(|sums| sums.of(native, "")));
        families.extend(LEGACY_SHARED.iter().filter_map(|name| native.get(*name)).cloned());
    }
    families.into_iter().map(|family| (family.name.clone(), family)).collect()
}

/// Joins labels.
fn joined(first: &str, second: &str) -> String {
    let comma = if first.is_empty() || second.is_empty() { "" } else { "," };
    format!("{first}{comma}{second}")
}

/// The sum of a metric's series, of those with a label if one is given.
fn value(native: &Families, selector: &str) -> f64 {
    let (name, label) = selector.split_once('{').unwrap_or((selector, ""));
    let series = native.get(name).map_or(&[][..], |family| &family.series);
    series
        .iter()
        .filter(|series| series.labels.contains(label.trim_end_matches('}')))
        .map(|series| series.value)
        .sum()
}

impl Sums {
    fn of(&self, native: &Families, common: &str) -> Family {
        let mut family = Family::new(self.name, self.kind, self.help);
        for (own, selectors) in self.series {
            family.add(joined(common, own), selectors.iter().map(|selector| value(native, selector)).sum());
        }
        family
    }
}

impl Distribution {
    fn of(&self, native: &Families, labels: &Labels<'_>) -> Family {
        let of = native.get(self.of);
        let mut family = Family::new(self.name, "histogram", of.map_or("", |of| &of.help));
        let common = labels.vllm();
        for series in of.map_or(&[][..], |of| &of.series) {
            let own = match bound(series) {
                None => common.clone(),
                Some(f64::INFINITY) => joined(&common, "le=\"+Inf\""),
                // As Python writes it.
                Some(bound) if self.bounds.have(bound, labels) => {
                    joined(&common, &format!("le=\"{bound:?}\""))
                }
                Some(_) => continue,
            };
            family.series.push(Series { labels: own, ..series.clone() });
        }
        family
    }
}

/// The upper bound of a bucket.
fn bound(series: &Series) -> Option<f64> {
    series.labels.strip_prefix("le=\"")?.strip_suffix('"')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::{
            Metrics,
            bounds::{SECONDS, TOKENS},
            page,
        },
        *,
    };

    /// Everything that a router records.
    fn native() -> Families {
        let metrics = Arc::new(Metrics::new().unwrap());
        let _kept = (metrics.engine(), metrics.adapters(), metrics.workers());
        page::read(&metrics.render())
    }

    #[test]
    fn every_series_that_a_name_is_made_of_is_recorded() {
        let native = native();
        let sums = VLLM_SUMS.iter().chain(&LEGACY_SUMS);
        let selectors = sums.flat_map(|sums| sums.series).flat_map(|(_, selectors)| *selectors);
        for selector in selectors {
            let (name, label) = selector.split_once('{').unwrap_or((selector, ""));
            let found = native.get(name).unwrap_or_else(|| panic!("{name} is not recorded"));
            let label = label.trim_end_matches('}');
            assert!(found.series.iter().any(|series| series.labels.contains(label)), "{selector}");
        }
        for name in VLLM_DISTRIBUTIONS.iter().map(|alias| &alias.of).chain(&LEGACY_SHARED) {
            assert!(native.contains_key(*name), "{name} is not recorded");
        }
    }

    #[test]
    fn the_servers_own_bounds_are_all_that_other_names_need() {
        for Distribution { name, of, bounds } in &VLLM_DISTRIBUTIONS {
            let Bounds::These(wanted) = bounds else { continue };
            let own = if of.ends_with("_rows") { &TOKENS[..] } else { &SECONDS };
            assert!(wanted.iter().all(|bound| own.contains(bound)), "{name}");
        }
        let labels = |max_tokens| Labels { model: "x", max_tokens: Some(max_tokens) };
        let tokens =
            |most| TOKENS.into_iter().filter(move |bound| Bounds::Tokens.have(*bound, &labels(most)));
        assert_eq!(tokens(300).collect::<Vec<_>>(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
        assert_eq!(tokens(131_072).count(), 16);
    }

    #[test]
    fn buckets_are_those_of_the_other_set_and_count_the_same() {
        let page = "# TYPE lorax_request_duration histogram\n\
            lorax_request_duration_bucket{le=\"0.25\"} 1\nlorax_request_duration_bucket{le=\"0.3\"} 2\n\
            lorax_request_duration_bucket{le=\"1\"} 3\nlorax_request_duration_bucket{le=\"+Inf\"} 4\n\
            lorax_request_duration_sum 9.5\nlorax_request_duration_count 4\n";
        let labels = Labels { model: "a\"b", max_tokens: None };
        let families = of(&page::read(page), &[MetricNames::Vllm], &labels);
        let common = "model_name=\"a\\\"b\",engine=\"0\"";
        let name = "vllm:e2e_request_latency_seconds";
        let expected = format!(
            "# HELP {name} \n# TYPE {name} histogram\n{name}_bucket{{{common},le=\"0.3\"}} 2\n\
             {name}_bucket{{{common},le=\"1.0\"}} 3\n{name}_bucket{{{common},le=\"+Inf\"}} 4\n\
             {name}_sum{{{common}}} 9.5\n{name}_count{{{common}}} 4\n"
        );
        assert_eq!(page::write(families.get(name).into_iter()), expected);
    }
}
