//! Values that are more than a number or a text: how flags and the file spell them, and how their bounds are checked.

use std::{fmt::Display, net::IpAddr, time::Duration};

use bytesize::ByteSize;

use crate::ConfigError;

/// The address to listen on unless a flag says otherwise: the environment's `HOSTNAME` only if it is an address,
/// because containers keep their names there.
pub(crate) fn address_of_environment() -> String {
    let named = std::env::var("HOSTNAME").ok();
    named.filter(|name| name.parse::<IpAddr>().is_ok()).unwrap_or_else(|| "0.0.0.0".into())
}

/// A number of bytes with an optional unit: `123`, `512MiB`, `1.5GiB`, `4GB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>().map(|size| size.as_u64())
}

/// A number of seconds, such as `30` or `0.5`. What is too large for a [`Duration`] is the longest one, which the
/// bounds of the settings then refuse.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if seconds.is_nan() || seconds < 0.0 {
        return Err("not a number of seconds".into());
    }
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// Refuses a value outside of its bounds, both included.
pub(crate) fn within<T: PartialOrd>(
    flag: &'static str,
    value: T,
    (least, most): (T, T),
    spell: impl Fn(T) -> String,
) -> Result<(), ConfigError> {
    if value < least {
        Err(ConfigError::TooSmall { flag, least: spell(least) })
    } else if value > most {
        Err(ConfigError::TooLarge { flag, most: spell(most) })
    } else {
        Ok(())
    }
}

pub(crate) fn spell_number(number: impl Display) -> String {
    number.to_string()
}

pub(crate) fn spell_seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

pub(crate) fn spell_bytes(bytes: u64) -> String {
    ByteSize::b(bytes).to_string()
}

/// Durations in the file: seconds as a number.
pub(crate) mod as_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(duration.as_secs_f64())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        Duration::try_from_secs_f64(f64::deserialize(from)?).map_err(D::Error::custom)
    }
}

/// Durations that may be absent, in the file: seconds as a number, or null.
pub(crate) mod as_optional_seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    struct Seconds(#[serde(with = "super::as_seconds")] Duration);

    pub(crate) fn serialize<S: Serializer>(duration: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        duration.map(Seconds).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Seconds>::deserialize(from)?.map(|seconds| seconds.0))
    }
}

/// Secrets in the file, which only its owner may read. Anywhere else a secret cannot be printed.
pub(crate) mod as_plain_secrets {
    use secrecy::{ExposeSecret, SecretString};
    use serde::{Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(secrets: &[SecretString], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(secrets.iter().map(ExposeSecret::expose_secret))
    }

    pub(crate) fn optional<S: Serializer>(secret: &Option<SecretString>, to: S) -> Result<S::Ok, S::Error> {
        secret.as_ref().map(ExposeSecret::expose_secret).serialize(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("17", 17),
            ("17B", 17),
            ("2GiB", 2 << 30),
            ("3 MB", 3_000_000),
            ("512MiB", 512 << 20),
            ("4KB", 4_000),
            ("64KiB", 64 << 10),
            ("4GB", 4_000_000_000),
            ("1.5GiB", 3 << 29),
            ("2TiB", 2 << 40),
            ("9007199254740993", 9_007_199_254_740_993),
        ] {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        for bad in ["", "GiB", "2XiB", "-1", "1e3", "inf", "NaN", "0x10", "two", "18446744073709551616"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_seconds() {
        for (text, duration) in [
            ("0", Duration::ZERO),
            ("30", Duration::from_secs(30)),
            ("0.5", Duration::from_millis(500)),
            ("1e3", Duration::from_secs(1000)),
            ("18446744073709551616", Duration::MAX),
            ("inf", Duration::MAX),
        ] {
            assert_eq!(seconds(text), Ok(duration), "{text}");
        }
        for bad in ["", "-1", "NaN", "30s", "half"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
