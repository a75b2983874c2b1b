//! Which way messages of a size go.

use crate::{Error, Result};

/// A way of summing over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Every rank sends all to all others.
    OneShot,
    /// Every rank sums a part, and sends the sums to all others.
    TwoShots,
    Nccl,
}

const WAYS: [Way; 3] = [Way::OneShot, Way::TwoShots, Way::Nccl];

impl Way {
    fn code(self) -> u8 {
        WAYS.iter().position(|&way| way == self).unwrap_or_default() as u8
    }

    fn name(self) -> &'static str {
        match self {
            Way::OneShot => "one shot",
            Way::TwoShots => "two shots",
            Way::Nccl => "NCCL",
        }
    }
}

/// Messages of the smallest and the largest size that ways are timed for.
const SMALLEST: usize = 16 << 10;
pub(super) const LARGEST: usize = 16 << 20;
/// A later way must be faster than this share of the time of an earlier one: what is timed varies.
const CLEARLY: f64 = 0.95;

/// The way of every size of messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bands {
    /// Ascending: the most bytes of a message, and its way. Larger ones go the last way.
    bands: Vec<(usize, Way)>,
}

impl Bands {
    /// One way for all.
    pub(super) fn only(way: Way) -> Bands {
        Bands { bands: vec![(usize::MAX, way)] }
    }

    /// The fastest of some ways at each size. `seconds` times a way with a message of so many bytes.
    pub(super) fn measure(ways: &[Way], mut seconds: impl FnMut(Way, usize) -> Result<f64>) -> Result<Bands> {
        let mut bands: Vec<(usize, Way)> = Vec::new();
        let sizes = std::iter::successors(Some(SMALLEST), |bytes| Some(2 * bytes));
        for bytes in sizes.take_while(|&bytes| bytes <= LARGEST) {
            let mut best: Option<(f64, Way)> = None;
            for &way in ways {
                let time = seconds(way, bytes)?;
                if best.is_none_or(|(fastest, _)| time < CLEARLY * fastest) {
                    best = Some((time, way));
                }
            }
            let Some((_, way)) = best else { continue };
            match bands.last_mut() {
                Some(last) if last.1 == way => last.0 = bytes / 2 * 3,
                _ => bands.push((bytes / 2 * 3, way)),
            }
        }
        Ok(Bands { bands })
    }

    pub(super) fn way(&self, bytes: usize) -> Way {
        let band = self.bands.iter().find(|(most, _)| bytes <= *most).or(self.bands.last());
        band.map_or(Way::OneShot, |&(_, way)| way)
    }

    /// For the other ranks.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let band = |(most, way): &(usize, Way)| {
            let mut bytes = (*most as u64).to_le_bytes().to_vec();
            bytes.push(way.code());
            bytes
        };
        self.bands.iter().flat_map(band).collect()
    }

    /// What another rank says.
    pub(super) fn of(bytes: &[u8]) -> Result<Bands> {
        let op = "agree on bands";
        let mut bands = Vec::new();
        for band in bytes.chunks(9) {
            let (most, code) = band
                .split_first_chunk::<8>()
                .and_then(|(most, rest)| Some((u64::from_le_bytes(*most) as usize, *rest.first()?)))
                .ok_or(Error::Shape { op, what: "bytes of a band", got: band.len(), expected: 9 })?;
            let (index, limit) = (usize::from(code), WAYS.len());
            let way = WAYS.get(index).ok_or(Error::Index { op, what: "way", index, limit })?;
            bands.push((most, *way));
        }
        Ok(Bands { bands })
    }
}

impl std::fmt::Display for Bands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (most, way)) in self.bands.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match self.bands.len() - 1 == i {
                true => write!(f, "{comma}{}", way.name())?,
                false => write!(f, "{comma}{} up to {} KiB", way.name(), most >> 10)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The way that is fastest where one shot takes 5 µs and 3 µs for each MiB, two shots 9 and 1.5, NCCL 15 and 1.
    fn measured() -> Bands {
        let time = |way, bytes| {
            let mib = bytes as f64 / (1 << 20) as f64;
            Ok(match way {
                Way::OneShot => 5.0 + 3.0 * mib,
                Way::TwoShots => 9.0 + 1.5 * mib,
                Way::Nccl => 15.0 + mib,
            })
        };
        Bands::measure(&WAYS, time).unwrap()
    }

    #[test]
    fn each_size_goes_the_fastest_way() {
        let bands = measured();
        for (bytes, way) in [
            (1, Way::OneShot),
            (16 << 10, Way::OneShot),
            (1 << 20, Way::OneShot),
            (4 << 20, Way::TwoShots),
            (8 << 20, Way::TwoShots),
            (16 << 20, Way::Nccl),
            (1 << 30, Way::Nccl),
        ] {
            assert_eq!(bands.way(bytes), way, "{bytes} bytes: {bands}");
        }
        assert_eq!(bands.to_string(), "one shot up to 3072 KiB, two shots up to 12288 KiB, NCCL");
    }

    #[test]
    fn other_ranks_read_what_one_says() {
        for bands in [measured(), Bands::only(Way::Nccl), Bands::only(Way::TwoShots)] {
            assert_eq!(Bands::of(&bands.bytes()).unwrap(), bands);
        }
        assert_eq!(Bands::only(Way::OneShot).way(usize::MAX), Way::OneShot);
        assert!(Bands::of(&[1, 2, 3]).is_err());
        assert!(Bands::of(&[0, 0, 0, 0, 0, 0, 0, 0, 3]).is_err());
    }

    #[test]
    fn a_way_that_is_hardly_faster_is_not_taken() {
        let time = |way, _| Ok(if way == Way::OneShot { 10.0 } else { 9.8 });
        assert_eq!(Bands::measure(&WAYS, time).unwrap().way(1 << 20), Way::OneShot);
    }
}
