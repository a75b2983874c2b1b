//! Models and adapters whose weights a formula makes: folders of manifests, see
//! `integration-tests/fixtures/families/README.md`.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use kernels::DType;
use safetensors::{Dtype, View, serialize_to_file};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::adapter::{CONFIG_FILE, WEIGHTS_FILES};

/// What a manifest describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Model,
    Adapter,
}

/// A model or an adapter before its files are written.
#[derive(Debug, Clone, Deserialize)]
pub struct Manifest {
    kind: Kind,
    seed: u64,
    /// The content of the configuration file.
    pub config: Value,
    /// The tensors of the weights file.
    pub tensors: Vec<Seeded>,
    /// A file beside the manifest that is the weights file.
    weights: Option<PathBuf>,
    /// The subfolder that configuration and weights lie in.
    #[serde(default)]
    folder: PathBuf,
    /// Other files by name.
    #[serde(default)]
    files: Map<String, Value>,
    /// Where the manifest lies.
    #[serde(skip)]
    beside: PathBuf,
}

/// A tensor by formula.
#[derive(Debug, Clone, Deserialize)]
pub struct Seeded {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Added to each value.
    pub offset: f32,
    /// Values are integers of ±m, scaled.
    pub m: u64,
    /// The scale's negative exponent.
    pub s: i32,
    /// Decides on the values, if the seed and the name do not.
    pub key: Option<String>,
}

impl Manifest {
    /// Reads a manifest.
    pub fn read(path: &Path) -> io::Result<Manifest> {
        let manifest: Manifest = serde_json::from_slice(&fs::read(path)?)?;
        Ok(Manifest { beside: path.parent().unwrap_or(Path::new("")).into(), ..manifest })
    }

    /// Gives the tensors other names, and leaves their values as they are.
    pub fn rename(&mut self, renamed: impl Fn(&str) -> String) {
        for tensor in &mut self.tensors {
            tensor.key = Some(tensor.key(self.seed));
            tensor.name = renamed(&tensor.name);
        }
    }

    /// Writes the folder that it describes, with elements of this type; every value is exact in each type.
    pub fn write(&self, out: &Path, dtype: DType) -> io::Result<()> {
        let (config, weights) = match self.kind {
            Kind::Model => ("config.json", "model.safetensors"),
            Kind::Adapter => (CONFIG_FILE, WEIGHTS_FILES[0]),
        };
        let inner = out.join(&self.folder);
        fs::create_dir_all(&inner)?;
        fs::write(inner.join(config), self.config.to_string())?;
        for (name, content) in &self.files {
            fs::write(out.join(name), content.to_string())?;
        }
        if let Some(made) = &self.weights {
            return fs::copy(self.beside.join(made), inner.join(weights)).map(drop);
        }
        let tensors = self.tensors.iter().map(|tensor| {
            let data = tensor.values(self.seed).flat_map(|x| encode(x, dtype)).collect();
            (tensor.name.as_str(), Stored { dtype, shape: &tensor.shape, data })
        });
        let tensors: BTreeMap<&str, Stored<'_>> = tensors.collect();
        serialize_to_file(&tensors, None, &inner.join(weights)).map_err(io::Error::other)
    }
}

impl Seeded {
    fn key(&self, seed: u64) -> String {
        self.key.clone().unwrap_or_else(|| format!("{seed}/{}", self.name))
    }

    /// The values, row-major.
    fn values(&self, seed: u64) -> impl Iterator<Item = f32> {
        let key = self.key(seed);
        // FNV-1a.
        let state = key.bytes().fold(0xcbf2_9ce4_8422_2325, |state: u64, byte| {
            (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let (m, scale, offset) = (self.m, f32::powi(2.0, -self.s), self.offset);
        (1..=self.shape.iter().product::<usize>() as u64).map(move |i| {
            // SplitMix64 (Steele, Lea, Flood, 2014).
            let z = state.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            let k = ((z ^ z >> 31) >> 32) % (2 * m + 1);
            offset + (k as f32 - m as f32) * scale
        })
    }
}

/// The bytes of a value.
fn encode(x: f32, dtype: DType) -> impl Iterator<Item = u8> {
    let (bytes, size) = match dtype {
        DType::F32 => (x.to_le_bytes(), 4),
        DType::Bf16 => (u32::from(half::bf16::from_f32(x).to_bits()).to_le_bytes(), 2),
        DType::F16 => (u32::from(half::f16::from_f32(x).to_bits()).to_le_bytes(), 2),
    };
    bytes.into_iter().take(size)
}

/// A tensor as it is written.
struct Stored<'a> {
    dtype: DType,
    shape: &'a [usize],
    data: Vec<u8>,
}

impl View for &Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_formula() {
        let (name, shape) = ("model.embed_tokens.weight".to_owned(), vec![320, 64]);
        let tensor = Seeded { name, shape, offset: 0.0, m: 111, s: 6, key: None };
        let values: Vec<f32> = tensor.values(1).take(4).collect();
        assert_eq!(values, [-0.046875, 0.53125, -1.703125, -1.359375]);
    }
}
