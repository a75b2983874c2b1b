//! The names by which the exchange knows references, sources and credentials.

use blake3::Hasher;
use exchange::{Content, CredentialId, ReferenceId, SourceId};
use secrecy::{ExposeSecret, SecretString};
use sources::Reference;

/// The digest of texts. Each is preceded by its length, so that no two lists of texts are hashed as the same bytes.
fn digest<'a>(mut hasher: Hasher, texts: impl IntoIterator<Item = &'a str>) -> [u8; 16] {
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    let mut digest = [0; 16];
    hasher.finalize_xof().fill(&mut digest);
    digest
}

/// Names a reference.
pub(super) fn reference(reference: &Reference) -> ReferenceId {
    let Reference { kind, id, revision } = reference;
    let revision = revision.as_deref();
    let texts = [kind.to_string(), id.clone(), format!("{revision:?}")];
    ReferenceId(u128::from_le_bytes(digest(Hasher::new(), texts.iter().map(String::as_str))))
}

/// Names a merge of this content. A part of its hash is enough, as for all references.
pub(super) fn merge(content: Content) -> ReferenceId {
    let mut digest = [0; 16];
    digest.copy_from_slice(&content.0[..16]);
    ReferenceId(u128::from_le_bytes(digest))
}

/// Names a place that fails as one.
pub(super) fn source(place: &str) -> SourceId {
    let [a, b, c, d, e, f, g, h, ..] = digest(Hasher::new(), [place]);
    SourceId(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

/// Names secrets in a way that says nothing of them to who does not know the key, which never leaves this process.
pub(super) struct Credentials {
    key: [u8; 32],
}

impl Credentials {
    pub(super) fn new() -> Credentials {
        Credentials { key: rand::random() }
    }

    /// Names a secret; 0 is the name of none.
    pub(super) fn name(&self, secret: Option<&SecretString>) -> CredentialId {
        let Some(secret) = secret else { return CredentialId(0) };
        let digest = digest(Hasher::new_keyed(&self.key), [secret.expose_secret()]);
        CredentialId(u128::from_le_bytes(digest))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_differ_if_what_they_name_does() {
        let names = [
            ("local", "a"),
            ("hub", "a"),
            ("hub", "a/b"),
            ("hub", "a/b@main"),
            ("hub", "a/b@mai"),
            ("s3", "s3://a/b"),
            ("gs", "gs://a/b"),
            ("az", "az://a/b"),
            ("local", "a/b"),
            ("local", "a/b@main"),
            ("pbase", "a/1"),
        ];
        let id = |(source, id): (&str, &str)| super::reference(&Reference::parse(source, id).unwrap());
        assert_eq!(names.map(id).into_iter().collect::<BTreeSet<_>>().len(), names.len());
        assert_eq!(id(("local", "s3://a/b")), id(("s3", "s3://a/b")), "an address names its source itself");
        let places = ["hub https://a", "hub https://b", "hub", ""];
        assert_eq!(places.map(source).into_iter().collect::<BTreeSet<_>>().len(), places.len());
    }

    #[test]
    fn secrets_have_other_names_in_another_process() {
        let (one, other) = (Credentials::new(), Credentials::new());
        let secrets = ["a", "b", "ab", "", " a"].map(SecretString::from);
        let names = secrets.each_ref().map(|secret| one.name(Some(secret)));
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>().len(), names.len());
        assert_eq!(names, secrets.each_ref().map(|secret| one.name(Some(secret))));
        assert!(secrets.iter().zip(names).all(|(secret, name)| other.name(Some(secret)) != name));
        assert_eq!((one.name(None), other.name(None)), (CredentialId(0), CredentialId(0)));
    }
}
