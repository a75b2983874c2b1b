//! Series with the names of adapters and tenants, which are made when the page is read.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{
    aliases::Labels,
    page::{Family, label},
    usage::{Figures, Name},
};
use crate::wire::Info;

/// An adapter that is somewhere, or that requests wait for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// As requests name it.
    pub(crate) name: String,
    /// Whether it is in a device slot, and ready.
    pub(crate) in_slot: bool,
    pub(crate) in_host: bool,
    pub(crate) pinned: bool,
    pub(crate) max_lora_rank: Option<u32>,
    /// Requests of it that have begun and not ended.
    pub(crate) running: usize,
}

/// The name of whatever is not shown by name.
pub(super) const OTHER: &str = "other";

/// The figures of a kind of things: `adapter` or `tenant`.
pub(super) fn usage(kind: &str, named: &[(Name, Figures)], (other, rest): (Name, Figures)) -> [Family; 4] {
    let figures = [
        ("requests_total", "Requests that have begun.", 1.0),
        ("prompt_tokens_total", "Prompt tokens of sequences that have begun to run.", 1.0),
        ("generated_tokens_total", "Tokens generated for requests.", 1.0),
        ("queue_seconds_total", "Seconds that sequences have waited until their first rows ran.", 1e6),
    ];
    let mut named: Vec<_> = named.iter().map(|(name, figures)| (spell(name), *figures)).collect();
    named.sort();
    named.push((spell(&other), rest));
    let mut number = 0..figures.len();
    figures.map(|(name, help, divisor)| {
        let mut family = Family::new(&format!("lorax_{kind}_{name}"), "counter", help);
        let number = number.next().unwrap_or_default();
        for (labels, figures) in &named {
            family.add(labels.clone(), figures[number] as f64 / divisor);
        }
        family
    })
}

fn spell(name: &Name) -> String {
    name.iter().map(|(name, value)| label(name, value)).collect::<Vec<_>>().join(",")
}

/// Requests that run, of the adapters that are shown by name.
pub(super) fn running(running: &[(Name, usize)]) -> Family {
    let mut family = Family::new(
        "lorax_adapter_running_requests",
        "gauge",
        "Requests that have begun and not ended, of adapters that are shown by name.",
    );
    for (name, running) in running {
        family.add(spell(name), *running as f64);
    }
    family
}

/// vLLM's gauges of what the model is served with.
pub(super) fn vllm_info(info: &Info) -> Family {
    let mut family =
        Family::new("vllm:cache_config_info", "gauge", "1, with the size of the KV cache as labels.");
    let size = [("block_size", info.block_size), ("num_gpu_blocks", info.num_blocks)];
    let size = size.map(|(name, value)| label(name, &value.to_string()));
    family.add(format!("engine=\"0\",{}", size.join(",")), 1.0);
    family
}

/// vLLM's gauges of adapters by name. At most `limit` of those that are only in host memory are told.
pub(super) fn vllm_adapters(held: &[Held], num_slots: u32, limit: usize, labels: &Labels<'_>) -> [Family; 2] {
    let mut requests = Family::new(
        "vllm:lora_requests_info",
        "gauge",
        "Time of the scrape in seconds since 1970, with the adapters in slots and those that requests wait for.",
    );
    let names = |wanted: fn(&&Held) -> bool| {
        // Whoever reads the list splits it at its commas.
        let held = held.iter().filter(|held| !held.name.contains(',')).filter(wanted);
        held.map(|held| held.name.trim()).collect::<Vec<_>>().join(",")
    };
    let (running, waiting) = (names(|held| held.in_slot), names(|held| !held.in_slot && held.running > 0));
    let lists = [
        ("max_lora", num_slots.to_string()),
        ("running_lora_adapters", running),
        ("waiting_lora_adapters", waiting),
    ];
    let lists = lists.map(|(name, value)| label(name, &value));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    requests.add(lists.join(","), now.as_secs_f64());
    let mut loaded =
        Family::new("vllm:lora_adapter_loaded", "gauge", "1 for each adapter in a slot or in host memory.");
    let in_host = held.iter().filter(|held| held.in_host);
    let in_host = in_host.enumerate().filter(|(place, held)| held.in_slot || *place < limit);
    let levels = held.iter().filter(|held| held.in_slot).map(|held| (held, "gpu"));
    for (held, level) in levels.chain(in_host.map(|(_, held)| (held, "cpu"))) {
        let own = [
            ("adapter_name", held.name.clone()),
            ("level", level.into()),
            ("pinned", held.pinned.to_string()),
            ("rank", held.max_lora_rank.map(|rank| rank.to_string()).unwrap_or_default()),
        ];
        let own = own.map(|(name, value)| label(name, &value));
        loaded.add(format!("{},{}", labels.vllm(), own.join(",")), 1.0);
    }
    [requests, loaded]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_told_once_for_each_level_and_names_with_commas_are_not_in_lists() {
        let held = |name: &str, in_slot, in_host, running| Held {
            name: name.into(),
            in_slot,
            in_host,
            running,
            pinned: name == "b",
            max_lora_rank: Some(8),
        };
        let all = [
            held("a", true, true, 1),
            held("b", false, true, 0),
            held("c,d", true, true, 0),
            held("e", false, true, 2),
            held("f", false, false, 1),
        ];
        let labels = Labels { model: "m", max_tokens: None };
        let [requests, loaded] = vllm_adapters(&all, 4, 2, &labels);
        let lists = "max_lora=\"4\",running_lora_adapters=\"a\",waiting_lora_adapters=\"e,f\"";
        assert_eq!(requests.series.iter().map(|series| &*series.labels).collect::<Vec<_>>(), [lists]);
        let level = |level: &str| {
            let level = format!("level=\"{level}\"");
            loaded.series.iter().filter(|series| series.labels.contains(&level)).count()
        };
        assert_eq!((level("gpu"), level("cpu")), (2, 3));
        let pinned =
            "model_name=\"m\",engine=\"0\",adapter_name=\"b\",level=\"cpu\",pinned=\"true\",rank=\"8\"";
        assert!(loaded.series.iter().any(|series| series.labels == pinned), "{loaded:?}");
    }
}
