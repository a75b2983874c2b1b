//! Files that were replaced after they had been hashed are another adapter's, whatever their sizes and times.

use std::{
    fs::{self, File, FileTimes},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use lorax_shard::adapters::{StageAnswer, Stamp};

use crate::{
    SESSION, World,
    fake::Fault,
    ticks,
    tiny::{self, write_adapter},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The time of modification that reproducible archives and layers of images have.
fn backdate(path: &Path) {
    let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(1)).set_accessed(UNIX_EPOCH);
    File::open(path).unwrap().set_times(times).unwrap();
}

fn backdate_all(folder: &Path) {
    for path in [folder.join(CONFIG), folder.join(WEIGHTS), folder.to_owned()] {
        backdate(&path);
    }
}

/// Writes into a file as it is, and restores its times.
fn rewrite(file: &Path, content: &[u8]) {
    let data = fs::metadata(file).unwrap();
    let times =
        FileTimes::new().set_modified(data.modified().unwrap()).set_accessed(data.accessed().unwrap());
    File::options().write(true).open(file).unwrap().write_all_at(content, 0).unwrap();
    File::open(file).unwrap().set_times(times).unwrap();
    assert_eq!(fs::metadata(file).unwrap().ino(), data.ino());
}

/// The configuration with another scale, in as many bytes.
fn rescaled(folder: &Path) -> Vec<u8> {
    let text = fs::read_to_string(folder.join(CONFIG)).unwrap();
    let other = text.replace("\"lora_alpha\":6", "\"lora_alpha\":9");
    assert!(text != other && text.len() == other.len());
    other.into()
}

/// Replaces what is in the first folder, which the second has something else for. Both have equal sizes and times.
type Replace = fn(&Path, &Path);

const WAYS: [(&str, Replace); 18] = [
    ("the folder is renamed", |at, new| {
        fs::rename(at, at.with_extension("old")).unwrap();
        fs::rename(new, at).unwrap();
    }),
    ("the folder is removed and another one renamed", |at, new| {
        fs::remove_dir_all(at).unwrap();
        fs::rename(new, at).unwrap();
    }),
    ("weights are renamed over the old ones", |at, new| {
        fs::rename(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap()
    }),
    ("weights are renamed, and the folder's time restored", |at, new| {
        fs::rename(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap();
        backdate(at);
    }),
    ("both files are renamed over the old ones", |at, new| {
        for file in [CONFIG, WEIGHTS] {
            fs::rename(new.join(file), at.join(file)).unwrap();
        }
    }),
    ("weights are rewritten in place", |at, new| {
        rewrite(&at.join(WEIGHTS), &fs::read(new.join(WEIGHTS)).unwrap());
    }),
    ("a few bytes of the weights are rewritten in place", |at, new| {
        let (mut old, new) = (fs::read(at.join(WEIGHTS)).unwrap(), fs::read(new.join(WEIGHTS)).unwrap());
        let last = old.len() - 8;
        old[last..].copy_from_slice(&new[last..]);
        rewrite(&at.join(WEIGHTS), &old);
    }),
    ("only the configuration is rewritten in place", |at, _| rewrite(&at.join(CONFIG), &rescaled(at))),
    ("only the configuration is renamed over the old one", |at, new| {
        fs::write(new.join(CONFIG), rescaled(at)).unwrap();
        backdate(&new.join(CONFIG));
        fs::rename(new.join(CONFIG), at.join(CONFIG)).unwrap();
    }),
    ("weights are copied over the old ones", |at, new| {
        fs::copy(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap();
        backdate(&at.join(WEIGHTS));
    }),
    ("weights are removed and written", |at, new| {
        // The inode may be the one that was just freed.
        let content = fs::read(new.join(WEIGHTS)).unwrap();
        fs::remove_file(at.join(WEIGHTS)).unwrap();
        fs::write(at.join(WEIGHTS), content).unwrap();
        backdate_all(at);
    }),
    ("weights are truncated and written", |at, new| {
        fs::write(at.join(WEIGHTS), fs::read(new.join(WEIGHTS)).unwrap()).unwrap();
        backdate(&at.join(WEIGHTS));
    }),
    ("weights are a hard link to others", |at, new| {
        fs::remove_file(at.join(WEIGHTS)).unwrap();
        fs::hard_link(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap();
        backdate(at);
    }),
    ("a hard link elsewhere is written through", |at, new| {
        let other = at.with_extension("link");
        fs::hard_link(at.join(WEIGHTS), &other).unwrap();
        rewrite(&other, &fs::read(new.join(WEIGHTS)).unwrap());
    }),
    ("weights become a link to others", |at, new| {
        fs::remove_file(at.join(WEIGHTS)).unwrap();
        symlink(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap();
        backdate(at);
    }),
    ("two adapters change places", |at, new| {
        let aside = at.with_extension("aside");
        fs::rename(at, &aside).unwrap();
        fs::rename(new, at).unwrap();
        fs::rename(aside, new).unwrap();
    }),
    ("two adapters change their weights", |at, new| {
        let aside = at.join("aside");
        fs::rename(at.join(WEIGHTS), &aside).unwrap();
        fs::rename(new.join(WEIGHTS), at.join(WEIGHTS)).unwrap();
        fs::rename(aside, new.join(WEIGHTS)).unwrap();
        backdate_all(at);
        backdate_all(new);
    }),
    ("the folder is removed and written", |at, new| {
        let files = [CONFIG, WEIGHTS].map(|file| (file, fs::read(new.join(file)).unwrap()));
        fs::remove_dir_all(at).unwrap();
        fs::create_dir(at).unwrap();
        for (file, content) in files {
            fs::write(at.join(file), content).unwrap();
        }
        backdate_all(at);
    }),
];

/// Writes two adapters for each way, the one that is replaced first.
fn write_pairs(world: &World) -> Vec<(PathBuf, PathBuf)> {
    let pair = |i: usize| {
        let (at, new) = (world.at(&format!("at-{i}")), world.at(&format!("new-{i}")));
        for (folder, seed) in [(&at, 100), (&new, 200)] {
            write_adapter(folder, seed + i as u64);
            backdate_all(folder);
        }
        (at, new)
    };
    (0..WAYS.len()).map(pair).collect()
}

#[tokio::test]
async fn files_that_have_changed_since_they_were_hashed_are_gone() {
    let world = World::new();
    let pairs = write_pairs(&world);
    ticks().await;
    for ((at, new), (way, replace)) in pairs.iter().zip(WAYS) {
        let order = tiny::order(at, SESSION);
        replace(at, new);
        assert_eq!(world.adapters.stage(order).await.unwrap(), StageAnswer::Gone, "{way}");
        // As another content, it can be staged.
        tiny::stage(&world.adapters, at, SESSION).await;
    }
    for file in [CONFIG, WEIGHTS] {
        let order = world.order("one");
        fs::remove_file(world.at("one").join(file)).unwrap();
        assert_eq!(world.adapters.stage(order).await.unwrap(), StageAnswer::Gone);
        write_adapter(&world.at("one"), 1);
    }
    let mut order = world.order("one");
    order.parts[0].folder.push("nowhere");
    assert_eq!(world.adapters.stage(order).await.unwrap(), StageAnswer::Gone);
}

#[tokio::test]
async fn files_that_change_while_they_are_read_are_gone() {
    let world = World::new();
    let pairs = write_pairs(&world);
    ticks().await;
    for ((at, new), (way, replace)) in pairs.iter().zip(WAYS) {
        let order = tiny::order(at, SESSION);
        let opened = [CONFIG, WEIGHTS].map(|file| File::open(at.join(file)).unwrap());
        let stamps = || opened.each_ref().map(|file| Stamp::of(&file.metadata().unwrap()));
        let before = stamps();
        world.script.fail("stage", Fault::Hang);
        let count = world.script.count("stage");
        let replaced = async {
            while world.script.count("stage") == count {
                tokio::task::yield_now().await;
            }
            replace(at, new);
            world.script.mend("stage");
        };
        let (answer, ()) = tokio::join!(world.adapters.stage(order), replaced);
        // The files that were hashed are still the same if only a folder has another name.
        match answer.unwrap() {
            StageAnswer::Staged(_) => assert_eq!(stamps(), before, "{way}"),
            answer => assert!(answer == StageAnswer::Gone && stamps() != before, "{way}: {answer:?}"),
        }
    }
}
