//! Flags and variables of LoRAX's launcher and of vLLM that this server does not have: those without effect are taken
//! with a warning, so that a command line works as it is, and those that would change the answers are refused by name.
//! `docs/migrating.md` lists them all; a test compares it with this.

mod table;

use std::env;

use clap::{
    Arg, ArgMatches, Args, Command, Error, FromArgMatches,
    builder::{BoolishValueParser, ValueParser},
    parser::ValueSource,
    value_parser,
};

pub(crate) use table::{FLAGS, VARIABLES};

/// A flag that only other servers have.
pub(crate) struct Flag {
    /// Its name, without dashes.
    pub(crate) name: &'static str,
    takes: Takes,
    /// The environment variable by which it can be given, too: LoRAX's flags have one, vLLM's have none.
    variable: Option<&'static str>,
    fate: Fate,
}

/// An environment variable that only other servers read.
pub(crate) struct Variable {
    pub(crate) name: &'static str,
    fate: Fate,
}

/// What a flag takes.
#[derive(Clone, Copy)]
enum Takes {
    /// `true` or `false`; nothing is `true`.
    Switch,
    Number,
    Text,
}

/// What is done with a flag that was given.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// Nothing, for this reason.
    NoEffect(&'static str),
    /// It is refused, for this reason.
    Refused(&'static str),
}

/// A flag or a variable that was given and is refused.
#[derive(Debug, thiserror::Error)]
#[error("{name} is not supported: {reason}")]
pub(crate) struct Refused {
    name: String,
    reason: &'static str,
}

/// The flags of other servers that were given: as they were given, and what is done with them.
#[derive(Debug, Clone, Default)]
pub(crate) struct ForeignFlags(Vec<(String, Fate)>);

impl ForeignFlags {
    /// Warns of what has no effect, once for each, and refuses the rest.
    pub(crate) fn check(&self) -> Result<(), Refused> {
        let is_set = |variable: &&Variable| env::var_os(variable.name).is_some_and(|value| !value.is_empty());
        let variables = VARIABLES.iter().filter(is_set).map(|set| (set.name.to_owned(), set.fate));
        let given: Vec<_> = self.0.iter().cloned().chain(variables).collect();
        for (name, fate) in &given {
            if let Fate::Refused(reason) = *fate {
                return Err(Refused { name: name.clone(), reason });
            }
        }
        for (name, fate) in &given {
            if let Fate::NoEffect(reason) = *fate {
                tracing::warn!("{name} has no effect: {reason}");
            }
        }
        Ok(())
    }
}

impl Args for ForeignFlags {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, flag| command.arg(flag.arg()))
    }

    fn augment_args_for_update(command: Command) -> Command {
        ForeignFlags::augment_args(command)
    }
}

impl FromArgMatches for ForeignFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<ForeignFlags, Error> {
        let given = FLAGS.iter().filter_map(|flag| Some((flag.given(matches)?, flag.fate)));
        Ok(ForeignFlags(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = ForeignFlags::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Flag {
    fn arg(&self) -> Arg {
        let parser = match self.takes {
            Takes::Switch => ValueParser::new(BoolishValueParser::new()),
            Takes::Number => value_parser!(f64).into(),
            Takes::Text => value_parser!(String),
        };
        let arg = Arg::new(self.name).long(self.name).hide(true).value_parser(parser);
        let arg = match self.takes {
            Takes::Switch => arg.num_args(0..=1).default_missing_value("true"),
            Takes::Number | Takes::Text => arg.num_args(1).allow_negative_numbers(true),
        };
        // Command lines are put together of parts; the last value would win.
        let arg = arg.overrides_with(self.name);
        match self.variable {
            Some(variable) => arg.env(variable),
            None => arg,
        }
    }

    /// The flag or the variable by which it was given; `None` if it asks for nothing.
    fn given(&self, matches: &ArgMatches) -> Option<String> {
        let name = match (matches.value_source(self.name)?, self.variable) {
            (ValueSource::EnvVariable, Some(variable)) => variable.to_owned(),
            _ => format!("--{}", self.name),
        };
        let asks = match self.takes {
            // A refused switch that is off asks for what is the case.
            Takes::Switch => matches.get_one::<bool>(self.name) == Some(&true) || !self.is_refused(),
            Takes::Number => true,
            Takes::Text => matches.get_one::<String>(self.name).is_some_and(|text| !text.is_empty()),
        };
        asks.then_some(name)
    }

    fn is_refused(&self) -> bool {
        matches!(self.fate, Fate::Refused(_))
    }
}
