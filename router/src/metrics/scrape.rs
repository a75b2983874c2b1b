//! `GET /metrics`: the figures that were recorded, and those that are made of the present state.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use config::MetricNames;

use super::{
    aliases::{self, Labels},
    named::{self, OTHER},
    page::{self, Family},
    usage::Name,
};
use crate::server::App;

/// The content type of Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `GET /metrics`
pub(crate) async fn page(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    app.adapters.publish().await;
    let info = app.engine.info();
    let max_tokens = info.as_ref().map(|info| app.request_limits(info).max_total_tokens);
    let labels = Labels { model: app.base.name(), max_tokens };
    let sets = &app.config.router.metrics;
    let native = page::read(&app.metrics.render());
    let mut shown = aliases::of(&native, sets, &labels);
    let mut add = |family: Family| _ = shown.insert(family.name.clone(), family);
    // The names of other tenants, and those that they use, are for the administrator alone.
    let sees_names = app.sees_names(&headers);
    if sets.contains(&MetricNames::Native) {
        native.into_values().for_each(&mut add);
        if sees_names {
            app.by_adapter().into_iter().chain(app.by_tenant()).for_each(&mut add);
        }
    }
    if sets.contains(&MetricNames::Vllm) {
        info.as_ref().map(|info| named::vllm_info(info)).into_iter().for_each(&mut add);
        let held = if sees_names { app.held().await } else { None };
        if let Some(held) = held {
            let num_slots = info.map_or(0, |info| info.num_slots);
            let limit = app.config.router.metrics_top;
            named::vllm_adapters(&held, num_slots, limit, &labels).into_iter().for_each(&mut add);
        }
    }
    ([(CONTENT_TYPE, TEXT_FORMAT)], page::write(shown.values())).into_response()
}

impl App {
    /// How adapters were used. Only those are shown that requests have found.
    fn by_adapter(&self) -> Vec<Family> {
        let book = self.adapters.book();
        let used = book.found().into_iter().map(|(reference, counts)| {
            let name: Name =
                vec![("adapter", reference.to_string()), ("source", reference.kind.name().to_owned())];
            (name, counts)
        });
        let used: Vec<_> = used.collect();
        let usages = used.iter().map(|(name, counts)| (name.clone(), counts.usage.clone())).collect();
        let limit = self.config.router.metrics_top;
        let (named, rest) = self.metrics.top_adapters().update(limit, usages, book.all());
        let is_shown = |name: &Name| named.iter().any(|(shown, _)| shown == name);
        let running = used.into_iter().filter(|(name, _)| is_shown(name));
        let running: Vec<_> = running.map(|(name, counts)| (name, counts.running())).collect();
        let other = vec![("adapter", OTHER.to_owned()), ("source", String::new())];
        let figures = named::usage("adapter", &named, (other, rest));
        figures.into_iter().chain([named::running(&running)]).collect()
    }

    /// How tenants have used the server.
    fn by_tenant(&self) -> Vec<Family> {
        let usages = self.metrics.tenants().named();
        let (limit, all) = (self.config.router.metrics_top, self.metrics.tenants().all());
        let (named, rest) = self.metrics.top_tenants().update(limit, usages, &all);
        named::usage("tenant", &named, (vec![("tenant", OTHER.to_owned())], rest)).into()
    }
}
