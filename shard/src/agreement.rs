//! Numbers on which the ranks of a model agree at the start, because their steps depend on them: every rank must run the
//! same steps.

use kernels::{Group, Result};

/// The lists of all ranks, by rank.
fn lists(group: &Group, own: &[usize]) -> Result<Vec<Vec<usize>>> {
    let bytes: Vec<u8> = own.iter().flat_map(|number| (*number as u64).to_le_bytes()).collect();
    let lists = group
        .exchange(&bytes)?
        .into_iter()
        .map(|bytes| bytes.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number) as usize).collect());
    Ok(lists.collect())
}

/// The numbers that any rank has, ascending.
pub fn union(group: &Group, own: &[usize]) -> Result<Vec<usize>> {
    let mut all = lists(group, own)?.concat();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// The smallest number of all ranks.
pub fn smallest(group: &Group, own: usize) -> Result<usize> {
    Ok(union(group, &[own])?.first().copied().unwrap_or(own))
}

/// The largest number of all ranks.
pub fn largest(group: &Group, own: usize) -> Result<usize> {
    Ok(union(group, &[own])?.last().copied().unwrap_or(own))
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn all_ranks_have_the_same_numbers() {
        const PATIENCE: Duration = Duration::from_secs(60);
        let (folder, own) = (tempfile::tempdir().unwrap(), [&[7, 3][..], &[], &[3, usize::MAX, 1 << 40]]);
        let path = folder.path();
        let agreed: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|rank| {
                    scope.spawn(move || {
                        let group = Group::join(path, rank, 3, PATIENCE).unwrap();
                        let union = union(&group, own[rank]).unwrap();
                        (union, smallest(&group, rank + 5).unwrap(), largest(&group, rank + 5).unwrap())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(agreed.iter().all(|agreed| *agreed == (vec![3, 7, 1 << 40, usize::MAX], 5, 7)));
        let alone = Group::alone();
        assert_eq!((union(&alone, &[2, 1]).unwrap(), smallest(&alone, 9).unwrap()), (vec![1, 2], 9));
    }
}
