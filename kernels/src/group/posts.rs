//! What ranks have told each other at places, the latest of each rank.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Something that a rank has told, and what it is about.
#[derive(Clone)]
struct Post {
    about: u64,
    bytes: Arc<[u8]>,
}

/// The latest posts by place and rank.
#[derive(Default)]
pub(super) struct Posts {
    ranks: usize,
    places: Mutex<HashMap<u64, Vec<Option<Post>>>>,
}

impl Posts {
    pub(super) fn of(ranks: usize) -> Posts {
        Posts { ranks, places: Mutex::default() }
    }

    /// Puts a post in place of the rank's earlier one.
    pub(super) fn put(&self, [place, about]: [u64; 2], rank: usize, bytes: &[u8]) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let posts = places.entry(place).or_insert_with(|| vec![None; self.ranks.max(1)]);
        posts[rank] = Some(Post { about, bytes: bytes.into() });
    }

    /// The posts of all ranks at a place, if all of them are about the same.
    pub(super) fn get(&self, [place, about]: [u64; 2]) -> Option<Vec<Arc<[u8]>>> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let posts = places.get_mut(&place)?;
        let fits = |post: &Option<Post>| {
            post.as_ref().filter(|post| post.about == about).map(|post| post.bytes.clone())
        };
        let all = posts.iter().map(fits).collect::<Option<Vec<_>>>()?;
        forget_empty(posts);
        Some(all)
    }

    /// Drops all posts without bytes.
    pub(super) fn forget_empty(&self) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.values_mut().for_each(|posts| forget_empty(posts));
    }
}

fn forget_empty(posts: &mut [Option<Post>]) {
    for post in posts {
        *post = post.take().filter(|post| !post.bytes.is_empty());
    }
}
