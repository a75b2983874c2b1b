//! What ranks have told each other at places, the latest of each rank.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Error, PeerFault, Result};

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

    /// The post of each rank at a place so far, if it is about that.
    pub(super) fn so_far(&self, [place, about]: [u64; 2]) -> Vec<Option<Arc<[u8]>>> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(posts) = places.get(&place) else { return vec![None; self.ranks.max(1)] };
        let bytes =
            |post: &Option<Post>| Some(post.as_ref().filter(|post| post.about == about)?.bytes.clone());
        posts.iter().map(bytes).collect()
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

/// The sums of what the ranks have told, `count` numbers each as little-endian f32, in the order of the ranks. Errors: a
/// rank has told another number of them.
pub(crate) fn sum_of_posts(all: &[Arc<[u8]>], count: usize) -> Result<Vec<f32>> {
    let mut sums = vec![0.0; count];
    for (rank, bytes) in all.iter().enumerate() {
        if bytes.len() != count * size_of::<f32>() {
            return Err(Error::Peer { op: "load", rank, fault: PeerFault::Differs });
        }
        let numbers = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn posts(all: &[&[f32]]) -> Vec<Arc<[u8]>> {
        all.iter().map(|squares| squares.iter().flat_map(|x| x.to_le_bytes()).collect()).collect()
    }

    #[test]
    fn numbers_are_summed_in_the_order_of_the_ranks() {
        let all = posts(&[&[1e8, 3.0], &[1.0, 0.5], &[-1e8, 0.25]]);
        assert_eq!(sum_of_posts(&all, 2).unwrap(), [(1e8_f32 + 1.0) - 1e8, 3.75]);
        let differs = posts(&[&[1.0, 2.0], &[1.0]]);
        assert!(matches!(
            sum_of_posts(&differs, 2),
            Err(Error::Peer { rank: 1, fault: PeerFault::Differs, .. })
        ));
    }
}
