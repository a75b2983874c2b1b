//! The adapter that is merged into the model's weights: its files, on this machine before a shard starts.

use std::path::{Path, PathBuf};

use anyhow::Context;
use sources::{Destination, Found, NameError, Reference, SourceSettings, Sources};

use crate::args::Args;

/// The adapter to merge, if the flags ask for it. Errors: its name cannot be one.
pub(crate) fn reference(args: &Args) -> Result<Option<Reference>, NameError> {
    let source = args.router.adapter_source_beside(&args.shard);
    args.router.merged_adapter().map(|id| Reference::parse(source, id)).transpose()
}

/// Fetches its files into a folder, unless they are read where they lie. Returns the folder that has them.
pub(crate) async fn fetch(args: &Args, reference: &Reference, into: &Path) -> anyhow::Result<PathBuf> {
    let found = async {
        let sources = sources(args, reference)?;
        let found = sources.lookup(reference, None).await?;
        if let Some(folder) = found.in_place {
            return Ok(folder);
        }
        std::fs::create_dir(into)?;
        let Found { bytes, .. } = found;
        tracing::info!(adapter = %reference, bytes, "fetching the adapter that is merged into the model");
        // The operator wants it, whatever its size is.
        let destination = Destination { folder: into, max_bytes: bytes, progress: &|_| () };
        sources.fetch(reference, &found, None, destination).await?;
        anyhow::Ok(into.to_owned())
    };
    found.await.with_context(|| format!("--adapter-id {reference}"))
}

/// Sources that let the operator name any folder and any bucket, and use the server's own token: what is bounded
/// otherwise is what requests may name.
fn sources(args: &Args, reference: &Reference) -> anyhow::Result<Sources> {
    let mut roots = args.shard.adapter_roots.clone();
    if reference.kind == sources::SourceKind::Local && Path::new(&reference.id).is_absolute() {
        roots.push(PathBuf::from(&reference.id));
    }
    let mut settings = SourceSettings::from_env(args.shard.adapter_dir.clone(), roots);
    settings.use_hub_token = true;
    let own = reference.kind.is_bucket() && !reference.id.starts_with('/');
    let buckets: Vec<String> = own.then(|| reference.to_string()).into_iter().collect();
    Ok(Sources::new(settings.with_buckets(&args.router.adapter_buckets)?.with_buckets(&buckets)?)?)
}
