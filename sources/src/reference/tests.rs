use super::*;

fn parse(source: &str, id: &str) -> Reference {
    Reference::parse(source, id).unwrap_or_else(|error| panic!("{source} {id}: {error}"))
}

#[test]
fn references_are_read_in_every_spelling() {
    use SourceKind::{Az, Gs, Hub, Local, Pbase, S3};
    for (source, text, kind, id, revision, shown) in [
        ("local", "sql", Local, "sql", None, "sql"),
        ("local", "/data/a@b", Local, "/data/a@b", None, "/data/a@b"),
        ("local", "deep/er/./x", Local, "deep/er/./x", None, "deep/er/./x"),
        ("hub", "org/name", Hub, "org/name", None, "org/name"),
        ("hub", "name", Hub, "name", None, "name"),
        ("hub", "org/name@v2", Hub, "org/name", Some("v2"), "org/name@v2"),
        ("hub", "org/name@refs/pr/1", Hub, "org/name", Some("refs/pr/1"), "org/name@refs/pr/1"),
        ("hub", "org/name@", Hub, "org/name", None, "org/name"),
        ("local", "hf://org/name@v2", Hub, "org/name", Some("v2"), "org/name@v2"),
        ("local", "huggingface://org/name", Hub, "org/name", None, "org/name"),
        ("hub", "s3://bucket/a/b", S3, "bucket/a/b", None, "s3://bucket/a/b"),
        ("s3", "s3://bucket/a/b/", S3, "bucket/a/b", None, "s3://bucket/a/b"),
        ("s3", "a/b", S3, "/a/b", None, "a/b"),
        ("s3", "s3://b.u-c_k/x@1:y", S3, "b.u-c_k/x@1:y", None, "s3://b.u-c_k/x@1:y"),
        ("local", "gs://bucket/a", Gs, "bucket/a", None, "gs://bucket/a"),
        ("gs", "bucket/a", Gs, "bucket/a", None, "gs://bucket/a"),
        ("local", "az://container/a", Az, "container/a", None, "az://container/a"),
        ("az", "container/a/", Az, "container/a", None, "az://container/a"),
        ("pbase", "repo/3", Pbase, "repo", Some("3"), "repo/3"),
        ("pbase", "repo", Pbase, "repo", None, "repo"),
        ("hub", "pbase://repo/3", Pbase, "repo", Some("3"), "repo/3"),
    ] {
        let found = parse(source, text);
        assert_eq!((found.kind, &*found.id, found.revision.as_deref()), (kind, id, revision), "{text}");
        assert_eq!(found.to_string(), shown, "{text}");
    }
}

#[test]
fn what_cannot_be_a_name_is_refused() {
    let long = "x".repeat(5000);
    for source in SourceKind::ALL {
        for id in ["", "a\nb", "a\0b", "\x1b[2J", "a\x7fb", &long] {
            let error = Reference::parse(source.name(), id).unwrap_err();
            assert!(matches!(error, NameError::Id { .. }), "{source} {id:?}: {error}");
            assert!(error.to_string().len() < 1000, "{error}");
        }
    }
    for (source, id) in [
        ("local", ".."),
        ("local", "../x"),
        ("local", "a/../../x"),
        ("local", "/data/.."),
        ("hub", "a/b/c"),
        ("hub", "/a"),
        ("hub", "a b"),
        ("hub", "org/.."),
        ("hub", "org//name"),
        ("hub", "a--b/c"),
        ("hub", "-a/b"),
        ("hub", "a/b."),
        ("hub", "a/b.git"),
        ("hub", "org/name@../x"),
        ("hub", "org/name@/x"),
        ("hub", "@main"),
        ("hub", &"x".repeat(97)),
        ("hub", "https://huggingface.co/org/name"),
        ("hub", "s3://"),
        ("s3", "s3://bucket"),
        ("s3", "s3://bucket/"),
        ("s3", "s3:///key"),
        ("s3", "s3://../key"),
        ("s3", "s3://buc ket/key"),
        ("s3", "s3://user:secret@bucket/key"),
        ("s3", "s3://bucket/a//b"),
        ("s3", "s3://bucket/a/../b"),
        ("s3", "s3://bucket/./b"),
        ("s3", "s3://bucket/a//"),
        ("s3", "/key"),
        ("gs", "bucket"),
        ("gs", "gs://bucket/"),
        ("az", "container"),
        ("pbase", "/3"),
        ("pbase", "repo/"),
        ("pbase", "a/b/3"),
        ("pbase", "../3"),
        ("pbase", "repo/.."),
    ] {
        let error = Reference::parse(source, id).unwrap_err();
        assert!(matches!(error, NameError::Id { .. }), "{source} {id:?}: {error}");
    }
    for source in ["", "HUB", "hub ", "http", "s3://", "locale", "pbase\0", "\u{202e}", "hub/s3", &long] {
        let error = Reference::parse(source, "x").unwrap_err();
        assert!(matches!(error, NameError::Source(_)), "{source:?}: {error}");
        assert!(error.to_string().len() < 1000, "{error}");
    }
}

#[test]
fn kinds_have_the_names_that_requests_use() {
    for kind in SourceKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
}
