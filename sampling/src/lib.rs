//! The parameters of sampling, declared once.
//!
//! [`parameters!`] is the table. Whatever has a field for each parameter is made from it: the struct that kernels
//! sample by, the fields of requests in both dialects, their range checks, and the conversions from and to the wire.
//! A new parameter is a row in the table, a field of the message `Sampling`, and its effect in the kernels; what is
//! missing does not compile.

mod range;

use range::Range;

/// The table: calls the macro that is named with the tokens in braces, followed by a row for each parameter.
///
/// A row has the parameter's name in requests of both dialects and on the wire, its type, and
/// - `off`: the value that has no effect,
/// - `default`: the value that a request draws with if it does not name the parameter,
/// - `draws`: whether a request of LoRAX's that names the parameter draws,
/// - `range`: the values that are allowed,
/// - `example`: one of them, other than `off` and `default`.
///
/// ```
/// macro_rules! names {
///     ({} $($(#[$doc:meta])* $name:ident: $type:ty { $($row:tt)* })*) => { [$(stringify!($name)),*] };
/// }
/// assert!(sampling::parameters!(names {}).contains(&"top_p"));
/// ```
#[macro_export]
macro_rules! parameters {
    ($then:ident { $($context:tt)* }) => {
        $then! {
            { $($context)* }
            /// Divides the logits. 0 chooses the most probable token.
            temperature: f32 { off: 0.0, default: 1.0, draws: true, range: at_least(0.0), example: 0.5 }
            /// Keeps the k most probable tokens; 0 keeps all.
            top_k: u32 { off: 0, default: 0, draws: true, range: at_least(0.0), example: 7 }
            /// Keeps the smallest set of tokens that have at least this probability together; 1 keeps all.
            top_p: f32 { off: 1.0, default: 1.0, draws: true, range: above_to(0.0, 1.0), example: 0.25 }
            /// Keeps the tokens that are at least this fraction as probable as the most probable one; 0 keeps all.
            min_p: f32 { off: 0.0, default: 0.0, draws: true, range: within(0.0, 1.0), example: 0.125 }
            /// Locally typical sampling (Meister et al., 2022): keeps the tokens whose surprise is nearest to the
            /// entropy, up to this probability together; 1 keeps all.
            typical_p: f32 { off: 1.0, default: 1.0, draws: true, range: above_to(0.0, 1.0), example: 0.75 }
            /// Divides positive and multiplies negative logits of every token in prompt or output (Keskar et al.,
            /// 2019); 1 is off. Within the range, no logit overflows.
            repetition_penalty: f32 {
                off: 1.0, default: 1.0, draws: false, range: within(0.01, 100.0), example: 1.5
            }
            /// Subtracted from a token's logit once for every time that it was generated (OpenAI's definition); 0 is
            /// off.
            frequency_penalty: f32 {
                off: 0.0, default: 0.0, draws: false, range: within(-2.0, 2.0), example: 0.5
            }
            /// Subtracted from the logit of every token that was generated at least once (OpenAI's definition); 0 is
            /// off.
            presence_penalty: f32 {
                off: 0.0, default: 0.0, draws: false, range: within(-2.0, 2.0), example: -0.5
            }
        }
    };
}

/// A token that is not chosen before so many tokens have been generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ban {
    /// The token.
    pub token: u32,
    /// The number of generated tokens from which on it may be chosen; [`Ban::ALWAYS`] if never.
    pub until: u32,
}

impl Ban {
    /// The number of a token that is never chosen.
    pub const ALWAYS: u32 = u32::MAX;
}

/// A value that a request may not ask for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutOfRange {
    /// The parameter's name.
    pub name: &'static str,
    range: Range,
}

impl OutOfRange {
    /// What the value has to be, for instance "must be > 0.0 and <= 1.0".
    pub fn problem(&self) -> String {
        self.range.to_string()
    }
}

macro_rules! structs {
    ({} $(
        $(#[$doc:meta])*
        $name:ident: $type:ty { off: $off:expr, default: $default:expr, draws: $draws:expr, range: $range:ident($($bound:expr),*), example: $example:expr }
    )*) => {
        /// How one sequence samples.
        ///
        /// The order of application is: repetition, frequency and presence penalty, logit bias, temperature, top-k,
        /// typical-p, top-p, min-p, then one draw. Bans are applied with the bias. Log-probabilities are those of the model's own distribution, before
        /// all of these.
        #[derive(Debug, Clone, PartialEq)]
        pub struct SamplingParams {
            $($(#[$doc])* pub $name: $type,)*
            /// Seed of the sequence. Draw i depends on (seed, i) alone, whatever else is in the batch.
            pub seed: u64,
            /// Number of the most probable tokens that are reported beside the chosen one.
            pub num_top: u32,
            /// Added to the logits of single tokens.
            pub logit_bias: Vec<(u32, f32)>,
            /// Tokens that are not chosen.
            pub bans: Vec<Ban>,
        }

        /// Chooses the most probable token.
        impl Default for SamplingParams {
            fn default() -> Self {
                SamplingParams { $($name: $off,)* seed: 0, num_top: 0, logit_bias: Vec::new(), bans: Vec::new() }
            }
        }

        impl SamplingParams {
            /// Checks every parameter of the table.
            pub fn check(&self) -> Result<(), OutOfRange> {
                $(
                    let range = Range::$range($($bound),*);
                    if !range.contains(f64::from(self.$name)) {
                        return Err(OutOfRange { name: stringify!($name), range });
                    }
                )*
                Ok(())
            }
        }

        /// The parameters that a request names.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct Named {
            $($(#[$doc])* pub $name: Option<$type>,)*
        }

        impl Named {
            /// Returns whether a request of LoRAX's that names these asks for a draw.
            pub fn ask_for_a_draw(&self) -> bool {
                $(($draws && self.$name.is_some()) ||)* false
            }

            /// The parameters of a request that draws.
            pub fn drawing(&self) -> SamplingParams {
                SamplingParams { $($name: self.$name.unwrap_or($default),)* ..SamplingParams::default() }
            }

            /// The parameters of a request that draws only if one of the named parameters says so.
            pub fn choosing(&self) -> SamplingParams {
                SamplingParams { $($name: self.$name.unwrap_or($off),)* ..SamplingParams::default() }
            }
        }
    };
}
parameters!(structs {});

impl SamplingParams {
    /// Returns whether tokens are drawn, so that the seed matters.
    pub fn draws(&self) -> bool {
        self.temperature > 0.0
    }

    /// Returns whether the tokens seen so far change the logits.
    pub fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! check_rows {
        ({} $(
            $(#[$doc:meta])*
            $name:ident: $type:ty { off: $off:expr, default: $default:expr, draws: $draws:expr, range: $range:ident($($bound:expr),*), example: $example:expr }
        )*) => { $({
            let named = Named { $name: Some($example), ..Named::default() };
            assert_eq!(named.drawing().$name, $example);
            assert_eq!(named.choosing().$name, $example);
            assert_ne!($example, $off, "an example shows an effect");
            assert_ne!($example, $default);
            assert_eq!(named.ask_for_a_draw(), $draws);
            for value in [$off, $default, $example] {
                let params = SamplingParams { $name: value, ..SamplingParams::default() };
                assert_eq!(params.check(), Ok(()), "{} {value}", stringify!($name));
            }
        })* };
    }

    #[test]
    fn rows_are_sound() {
        parameters!(check_rows {});
    }

    #[test]
    fn values_out_of_range_are_named_with_their_range() {
        let refused = |params: SamplingParams| {
            let error = params.check().unwrap_err();
            format!("{} {}", error.name, error.problem())
        };
        let neutral = SamplingParams::default;
        for (params, message) in [
            (
                SamplingParams { temperature: -0.5, ..neutral() },
                "temperature must be non-negative and finite",
            ),
            (
                SamplingParams { temperature: f32::INFINITY, ..neutral() },
                "temperature must be non-negative and finite",
            ),
            (SamplingParams { top_p: f32::NAN, ..neutral() }, "top_p must be > 0.0 and <= 1.0"),
            (SamplingParams { top_p: 0.0, ..neutral() }, "top_p must be > 0.0 and <= 1.0"),
            (SamplingParams { min_p: 1.5, ..neutral() }, "min_p must be >= 0.0 and <= 1.0"),
            (SamplingParams { typical_p: 0.0, ..neutral() }, "typical_p must be > 0.0 and <= 1.0"),
            (
                SamplingParams { repetition_penalty: 0.0, ..neutral() },
                "repetition_penalty must be >= 0.01 and <= 100.0",
            ),
            (
                SamplingParams { frequency_penalty: 2.5, ..neutral() },
                "frequency_penalty must be >= -2.0 and <= 2.0",
            ),
            (
                SamplingParams { presence_penalty: -2.5, ..neutral() },
                "presence_penalty must be >= -2.0 and <= 2.0",
            ),
        ] {
            assert_eq!(refused(params), message);
        }
    }
}
