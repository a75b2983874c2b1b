//! The plan for reading an adapter: the modules that its configuration names, and the tensors that its file has for
//! each.

use super::{
    AdapterError, BaseModel,
    base::BaseWeights,
    change::Change,
    config::{AdapterConfig, Target, TokenRows},
    initial,
    names::{Role, Tensors},
    norms,
    rows::{Rows, Sources},
    values::Values,
};
use crate::{
    Decoder,
    decoder::{ADDED_TOKENS, Module, Modules, Nesting, Part},
};

/// The changes that a configuration asks for.
pub(super) struct Plan {
    modules: Modules,
    is_tied: bool,
    targets: Vec<Target>,
    /// Whether both tables have the same delta.
    ties_deltas: bool,
    /// The tables whose whole weights were trained.
    saved: Vec<Part>,
    tokens: Vec<TokenRows>,
    has_biases: bool,
}

/// The paths of modules without weights, which PEFT matches, too.
fn other_paths(decoder: &Decoder, nesting: Nesting) -> Vec<String> {
    let names = &decoder.names;
    let (outer, inner) = names.others;
    let in_layers = (0..decoder.layers.len()).flat_map(|i| {
        inner.iter().map(move |path| match *path {
            "" => format!("{}.{i}", names.layers),
            path => format!("{}.{i}.{path}", names.layers),
        })
    });
    let inside = outer.iter().map(|path| (*path).to_owned()).chain(in_layers);
    let inside = inside.map(|path| nesting.path(names.base, &path));
    nesting.holders().iter().map(|path| (*path).to_owned()).chain(inside).collect()
}

impl Plan {
    /// `nesting`: where the decoder was in the model that the adapter was trained on.
    pub(super) fn of(
        config: &AdapterConfig,
        model: &BaseModel,
        nesting: Nesting,
    ) -> Result<Plan, AdapterError> {
        let modules = Modules::nested(&model.decoder, nesting);
        let others = other_paths(&model.decoder, nesting);
        let is_tied = model.decoder.head.tied;
        let saved = config.saved(&modules, &others, is_tied)?;
        let mut targets = config.targets(&modules, &others, is_tied)?;
        // PEFT adds no delta to a module that is saved as a whole; that of a table is refused below.
        let is_classifier = |part| matches!(part, Part::Dense | Part::Classifier);
        targets.retain(|target| !is_classifier(target.module.part) || !saved.contains(&target.module.part));
        initial::check(&targets, is_tied)?;
        let tokens = config.token_rows(&modules, is_tied)?;
        let clash = |part: &Part| {
            let is_target = targets.iter().any(|target| target.module.part == *part);
            let has_tokens = tokens.iter().any(|rows| rows.part == *part);
            usize::from(is_target) + usize::from(has_tokens) + usize::from(saved.contains(part)) > 1
        };
        if let Some(part) = [Part::Embed, Part::Head].into_iter().find(clash) {
            let fields = "target_modules, modules_to_save, trainable_token_indices".into();
            let value = format!("{}, in more than one of them,", model.decoder.names.path(None, part));
            return Err(AdapterError::Unsupported { field: fields, value });
        }
        let (ties_deltas, has_biases) = (config.ties_targets(is_tied)?, config.has_biases());
        Ok(Plan { modules, is_tied, targets, ties_deltas, saved, tokens, has_biases })
    }

    /// The adapter's changes, in the order of the table of modules.
    pub(super) fn changes(
        &self,
        values: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<Vec<Change>, AdapterError> {
        let mut tensors = Tensors::of(values, &self.modules)?;
        let tables = self.tables(&mut tensors)?;
        let mut targets = self.targets.iter().peekable();
        let mut changes = Vec::new();
        for module in self.modules.iter() {
            let mut change = Change::none(module);
            let target = targets.next_if(|target| target.module == *module);
            let table = tables.iter().find(|(part, _)| *part == module.part).map(|(_, name)| name.clone());
            let outputs = match &table {
                Some(name) => values.file.matrix_shape(name)?[0],
                None => module.outputs,
            };
            if let Some(target) = target {
                let tied =
                    self.modules.find(None, Part::Head).filter(|_| self.ties_deltas && module.is_lookup());
                change.add_delta(target, outputs, tied, &mut tensors)?;
            }
            if matches!(module.part, Part::Embed | Part::Head) {
                let tokens = self.token_rows(module, &mut tensors)?;
                let limit = module.outputs + ADDED_TOKENS;
                let from = Sources { table, tokens, has_delta: target.is_some(), limit };
                change.add_rows(Rows::find(module, from, values, base)?)?;
            }
            if matches!(module.part, Part::Dense | Part::Classifier) && self.saved.contains(&module.part) {
                change.add_weight(tensors.expect(module, Role::Table)?);
            }
            if self.has_biases || self.saved.contains(&module.part) {
                change.add_bias(&mut tensors);
            }
            changes.push(change);
        }
        tensors.expect_no_others()?;
        Ok(changes)
    }

    /// Moves trained biases of norms to the projections that read them.
    pub(super) fn spread(
        &self,
        changes: &mut [Change],
        values: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<(), AdapterError> {
        match self.has_biases {
            true => norms::spread(changes, &base.model.decoder, values, base),
            false => Ok(()),
        }
    }

    /// The tensors that are whole tables, each with the table that it replaces.
    fn tables(&self, tensors: &mut Tensors) -> Result<Vec<(Part, String)>, AdapterError> {
        let found = [Part::Embed, Part::Head].map(|part| {
            let module = self.modules.find(None, part)?;
            Some((module, tensors.take(module, Role::Table)))
        });
        let [embed, head] = &found;
        let own = |side: &Option<(&Module, Option<String>)>| side.as_ref().and_then(|(_, name)| name.clone());
        let mut tables = Vec::new();
        for (side, other) in [(embed, head), (head, embed)] {
            let Some((module, name)) = side else { continue };
            let Some((sibling, _)) = other else {
                // A model without an output projection.
                tables.extend(name.clone().map(|name| (module.part, name)));
                continue;
            };
            let is_saved = self.saved.contains(&module.part);
            // If the tables are tied, a copy of either stands for both. If only one of them was trained, PEFT unties
            // them.
            let is_shared = self.is_tied
                && match (is_saved, self.saved.contains(&sibling.part)) {
                    (true, true) => module.part == Part::Head,
                    (false, false) => true,
                    _ => false,
                };
            let name = name.clone().or_else(|| own(other).filter(|_| is_shared));
            match name {
                Some(name) => tables.push((module.part, name)),
                None if is_saved => drop(tensors.expect(module, Role::Table)?),
                None => {}
            }
        }
        Ok(tables)
    }

    /// The tensor with the rows of some tokens of a table, and these tokens.
    fn token_rows(
        &self,
        module: &Module,
        tensors: &mut Tensors,
    ) -> Result<Option<(String, Vec<u32>)>, AdapterError> {
        let Some(rows) = self.tokens.iter().find(|rows| rows.part == module.part) else { return Ok(None) };
        let of = self.modules.find(None, rows.of).unwrap_or(module);
        Ok(Some((tensors.expect_shared(of, Role::Tokens)?, rows.tokens.clone())))
    }
}
