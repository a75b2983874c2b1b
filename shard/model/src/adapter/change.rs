//! The change that an adapter makes at one module. It is known from the configuration and the headers of the file
//! before any memory is allocated, and read when there is memory.

mod merged;

use kernels::{DType, HostTensor, LoraPart, LoraShape, LowRank, ReplacedRows};

use super::{
    AdapterError,
    base::BaseWeights,
    config::Target,
    cut::Cutter,
    initial::{self, Initial},
    matrix::{Cut, IsCancelled, Made, Matrix, Pair, Whole},
    names::{Role, Tensors},
    rows::{Folded, Replaced, Rows},
    values::{Values, encoded},
};
use crate::{
    decoder::{Kind, Module},
    load::{stored_runs, transposed},
};
pub(super) use merged::Merged;

/// What parts are read from.
#[derive(Clone, Copy)]
pub(super) struct Sources<'a> {
    pub(super) file: &'a Values,
    pub(super) base: &'a BaseWeights<'a>,
    /// Asked before each read.
    pub(super) is_cancelled: IsCancelled<'a>,
}

/// A low-rank delta.
pub(super) struct Delta {
    pub(super) lora_rank: usize,
    /// The factor of the delta.
    pub(super) scale: f32,
    /// The tensor of A.
    pub(super) a: String,
    /// The tensor of B.
    pub(super) b: String,
    /// The number of rows of the weight or of the table.
    outputs: usize,
    /// Whether the tensors are those of the output projection to which this table is tied. Then its B is the transposed
    /// A of the table.
    is_crossed: bool,
    /// The part that its initialization has taken out of the base model's weight.
    initial: Option<Initial>,
}

impl Delta {
    /// The shapes of A and B in the file.
    fn shapes(&self, module: &Module) -> [[usize; 2]; 2] {
        match module.kind {
            Kind::Lookup => [[self.lora_rank, self.outputs], [module.inputs, self.lora_rank]],
            _ => [[self.lora_rank, module.inputs], [self.outputs, self.lora_rank]],
        }
    }

    /// Reads A and B.
    pub(super) fn read(
        &self,
        module: &Module,
        file: &Values,
    ) -> Result<[HostTensor<'static>; 2], AdapterError> {
        let shapes = self.shapes(module);
        let read = |name: &str, [rows, cols]: [usize; 2]| match self.is_crossed {
            false => file.matrix(name, [rows, cols]),
            true => Ok(transposed(&file.matrix(name, [cols, rows])?)),
        };
        Ok([read(&self.a, shapes[0])?, read(&self.b, shapes[1])?])
    }

    /// Where A and B are read from.
    fn sources<'a>(&'a self, module: &Module, file: &'a Values) -> Result<[Whole<'a>; 2], AdapterError> {
        let is_crossed = self.is_crossed;
        let source = |name: &'a str, [rows, cols]: [usize; 2]| {
            let stored = if is_crossed { [cols, rows] } else { [rows, cols] };
            file.expect_shape(name, &stored)?;
            Ok::<_, AdapterError>(match is_crossed || file.file.type_of_rows(name).is_none() {
                false => Whole::Stored { values: file, name },
                // Its elements lie apart: a few rows would be read element by element.
                true => Whole::Made(Made::new(move || {
                    let tensor = file.matrix(name, stored)?;
                    Ok(if is_crossed { transposed(&tensor) } else { tensor })
                })),
            })
        };
        let [a, b] = self.shapes(module);
        Ok([source(&self.a, a)?, source(&self.b, b)?])
    }

    /// The rank with which kernels compute.
    fn rank(&self) -> usize {
        if self.initial.is_some() { 2 * self.lora_rank } else { self.lora_rank }
    }
}

/// The change at a module.
pub(super) struct Change {
    pub(super) module: Module,
    pub(super) delta: Option<Delta>,
    magnitude: Option<String>,
    /// The bias of B.
    delta_bias: Option<String>,
    /// The bias that replaces the model's.
    bias: Option<String>,
    /// The vector that the trained bias of a norm adds to the module's input; of the last norm, to its output.
    pub(super) shift: Option<Vec<f32>>,
    rows: Option<Rows>,
    /// The weight that replaces the model's, of a classifier.
    weight: Option<String>,
}

impl Change {
    /// No change.
    pub(super) fn none(module: &Module) -> Change {
        let module = module.clone();
        Change {
            module,
            delta: None,
            magnitude: None,
            delta_bias: None,
            bias: None,
            shift: None,
            rows: None,
            weight: None,
        }
    }

    /// Takes the tensors of a delta. `outputs` is the number of rows of the adapter's weight. `tied` is the output
    /// projection that has the same delta as this table.
    pub(super) fn add_delta(
        &mut self,
        target: &Target,
        outputs: usize,
        tied: Option<&Module>,
        tensors: &mut Tensors,
    ) -> Result<(), AdapterError> {
        let module = &self.module;
        if !target.scale.is_finite() {
            return Err(AdapterError::ScaleTooLarge { module: module.path.clone() });
        }
        let (a, b) = match tied {
            None => (tensors.expect(module, Role::A)?, tensors.expect(module, Role::B)?),
            Some(head) => {
                // PEFT has the same tensors for both, and reads those of the output projection last.
                let _ = [Role::A, Role::B].map(|role| tensors.take(module, role));
                (tensors.expect_shared(head, Role::B)?, tensors.expect_shared(head, Role::A)?)
            }
        };
        let initial = target.initial.filter(|_| module.kind != Kind::Lookup);
        let Target { lora_rank, scale, .. } = *target;
        self.magnitude = target.has_magnitude.then(|| tensors.expect(module, Role::Magnitude)).transpose()?;
        self.delta_bias = target.has_bias.then(|| tensors.expect(module, Role::DeltaBias)).transpose()?;
        self.delta = Some(Delta { lora_rank, scale, a, b, outputs, is_crossed: tied.is_some(), initial });
        Ok(())
    }

    /// Takes the tensor of a trained bias, if there is one.
    pub(super) fn add_bias(&mut self, tensors: &mut Tensors) {
        self.bias = if self.module.bias { tensors.take(&self.module, Role::Bias) } else { None };
    }

    /// Adds the weight that replaces the model's.
    pub(super) fn add_weight(&mut self, tensor: String) {
        self.weight = Some(tensor);
    }

    /// Adds the rows that replace the model's.
    pub(super) fn add_rows(&mut self, rows: Option<Rows>) -> Result<(), AdapterError> {
        self.rows = rows;
        // The norms are those of columns, over all rows.
        if self.is_folded() && self.has_magnitude() && self.module.is_lookup() {
            let value = format!("true, of {} with other rows than the model's,", self.module.path);
            return Err(AdapterError::Unsupported { field: "use_dora".into(), value });
        }
        Ok(())
    }

    /// Removes and returns the tensor of the trained bias, which the caller handles.
    pub(super) fn take_bias(&mut self) -> Option<String> {
        self.bias.take()
    }

    /// Whether rows are replaced.
    pub(super) fn has_rows(&self) -> bool {
        self.rows.is_some()
    }

    /// Whether the delta is added to replaced rows.
    fn is_folded(&self) -> bool {
        self.rows.as_ref().is_some_and(|rows| rows.has_delta)
    }

    /// The end of the range of tokens that its rows allow to look up.
    pub(super) fn tokens(&self) -> usize {
        self.rows.as_ref().filter(|_| self.module.is_lookup()).map_or(0, Rows::end)
    }

    /// Whether its delta is one that took a part out of the base model's weight.
    pub(super) fn has_initial(&self) -> bool {
        self.delta.as_ref().is_some_and(|delta| delta.initial.is_some())
    }

    /// Whether all rows are the model's, and their number is.
    pub(super) fn has_only_model_rows(&self) -> bool {
        !self.has_rows() && self.delta.as_ref().is_none_or(|delta| delta.outputs == self.module.outputs)
    }

    /// Whether there is a magnitude.
    pub(super) fn has_magnitude(&self) -> bool {
        self.magnitude.is_some()
    }

    /// Its place and size; `None` if it changes nothing.
    pub(super) fn shape(&self) -> Option<LoraShape> {
        let (site, slice) = self.module.place?;
        let delta = self.delta.as_ref().filter(|_| !self.is_folded());
        let has_bias = self.delta_bias.is_some() || self.bias.is_some() || self.shift.is_some();
        let rows = self.rows.as_ref().map_or(0, |rows| rows.count);
        let has_magnitude = self.has_magnitude() && !self.is_folded();
        let is_change = delta.is_some() || has_magnitude || has_bias || rows > 0 || self.weight.is_some();
        // The difference of two weights is a delta whose B is the identity.
        let of_weight = self.weight.as_ref().map_or(0, |_| self.module.outputs);
        let lora_rank = delta.map_or(of_weight, Delta::rank);
        is_change.then_some(LoraShape { site, slice, lora_rank, has_magnitude, has_bias, rows })
    }

    /// As [`Self::shape`], of the share of a model.
    pub(super) fn shape_of(&self, cutter: Cutter<'_>) -> Option<LoraShape> {
        cutter.shape(self.shape()?, self.rows.as_ref().and_then(Rows::ids), &self.module)
    }

    /// The part, if there is one. Its vectors have been read, and its matrices are read from then on.
    pub(super) fn part<'a>(
        &'a self,
        from: Sources<'a>,
    ) -> Result<Option<LoraPart<Matrix<'a>>>, AdapterError> {
        let Sources { file, base, is_cancelled } = from;
        let Some(LoraShape { site, slice, .. }) = self.shape() else { return Ok(None) };
        let mut part =
            LoraPart { site, slice, low_rank: None, magnitude: None, bias: None, rows: None, content: 0 };
        let outputs = self.delta.as_ref().map_or(self.module.outputs, |delta| delta.outputs);
        let len = if self.module.kind == Kind::Lookup { self.module.inputs } else { outputs };
        let magnitude = self.magnitude.as_ref().map(|name| file.vector(name, len)).transpose()?;
        if let Some(rows) = &self.rows {
            let folded = self.delta.as_ref().filter(|_| rows.has_delta);
            let folded =
                folded.map(|delta| Folded::read(&self.module, delta, magnitude.clone(), file)).transpose()?;
            let whole = Whole::Replaced(Replaced::new(rows, file, folded));
            let values = Matrix::new(whole, rows.shape(), is_cancelled);
            part.rows = Some(ReplacedRows { ids: rows.ids().map(<[u32]>::to_vec), values });
        }
        if !self.is_folded() {
            part.magnitude = magnitude.map(|magnitude| self.ordered(magnitude));
            part.low_rank = self.delta.as_ref().map(|delta| self.low_rank(delta, from)).transpose()?;
        }
        if let Some(weight) = &self.weight {
            part.low_rank = Some(self.difference(weight, from)?);
        }
        part.bias = self.read_bias(file, base)?.map(|bias| self.ordered(bias));
        Ok(Some(part))
    }

    fn low_rank<'a>(
        &'a self,
        delta: &'a Delta,
        from: Sources<'a>,
    ) -> Result<LowRank<Matrix<'a>>, AdapterError> {
        let Sources { file, base, is_cancelled } = from;
        let module = &self.module;
        let [a, b] = match delta.initial {
            Some(initial) => Pair::of(move || {
                let (a, b) = initial::extended(initial, module, delta.read(module, file)?, base)?;
                Ok([a, b])
            })
            .map(Whole::Made),
            None => delta.sources(module, file)?,
        };
        let [[_, inputs], [outputs, _]] = delta.shapes(module);
        let rank = delta.rank();
        let a = Matrix::new(a, [rank, inputs], is_cancelled);
        let mut b = Matrix::new(b, [outputs, rank], is_cancelled);
        if module.kind != Kind::Lookup {
            let all: Vec<_> = std::iter::once(0..outputs).collect();
            b = b.rows(&stored_runs(all, module));
        }
        Ok(LowRank { rank, scale: delta.scale, a, b })
    }

    /// The difference between a weight of the adapter's and the model's.
    fn difference<'a>(
        &'a self,
        weight: &'a str,
        from: Sources<'a>,
    ) -> Result<LowRank<Matrix<'a>>, AdapterError> {
        let Sources { file, base, is_cancelled } = from;
        let module = &self.module;
        let shape @ [outputs, _] = [module.outputs, module.inputs];
        file.expect_shape(weight, &shape)?;
        let difference = move || {
            let mut values = file.matrix(weight, shape)?.to_f32();
            let cols = module.inputs;
            base.each_row(module, |i, row| {
                values[i * cols..][..cols].iter_mut().zip(row).for_each(|(own, base)| *own -= base);
            })?;
            Ok(encoded(shape, &values, DType::F32))
        };
        let identity = move || {
            let values: Vec<f32> =
                (0..outputs * outputs).map(|i| f32::from(u8::from(i / outputs == i % outputs))).collect();
            Ok(encoded([outputs; 2], &values, DType::F32))
        };
        let a = Matrix::new(Whole::Made(Made::new(difference)), shape, is_cancelled);
        let b = Matrix::new(Whole::Made(Made::new(identity)), [outputs; 2], is_cancelled);
        Ok(LowRank { rank: outputs, scale: 1.0, a, b })
    }

    /// The vector that is added to the model's bias, in the order of the file.
    fn read_bias(&self, file: &Values, base: &BaseWeights<'_>) -> Result<Option<Vec<f32>>, AdapterError> {
        let module = &self.module;
        let outputs = self.delta.as_ref().map_or(module.outputs, |delta| delta.outputs);
        let mut sum: Option<Vec<f32>> = None;
        let mut add = |values: Vec<f32>| match &mut sum {
            None => sum = Some(values),
            Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x),
        };
        if let Some(shift) = &self.shift {
            add(self.of_shift(shift, file, base)?);
        }
        if let (Some(name), Some(delta)) = (&self.delta_bias, &self.delta) {
            add(file.vector(name, outputs)?.into_iter().map(|x| delta.scale * x).collect());
        }
        if let Some(name) = &self.bias {
            let (own, bases) = (file.vector(name, module.outputs)?, base.bias(module)?);
            add(own.iter().zip(bases).map(|(own, base)| own - base).collect());
        }
        Ok(sum)
    }

    /// The change of the module's output when a vector is added to every row of its input.
    fn of_shift(
        &self,
        shift: &[f32],
        file: &Values,
        base: &BaseWeights<'_>,
    ) -> Result<Vec<f32>, AdapterError> {
        let dot = |row: &[f32]| row.iter().zip(shift).map(|(x, y)| f64::from(x * y)).sum::<f64>() as f32;
        let mut moved = vec![0.0; self.module.outputs];
        base.each_row(&self.module, |i, row| moved[i] = dot(row))?;
        if let Some(delta) = &self.delta {
            let [a, b] = delta.read(&self.module, file)?.map(|tensor| tensor.to_f32());
            let inner: Vec<f32> = a.chunks_exact(self.module.inputs).map(dot).collect();
            for (moved, row) in moved.iter_mut().zip(b.chunks_exact(delta.lora_rank)) {
                *moved += delta.scale * row.iter().zip(&inner).map(|(x, y)| x * y).sum::<f32>();
            }
        }
        Ok(moved)
    }

    /// Brings a vector over the outputs into the order that operations expect.
    fn ordered(&self, values: Vec<f32>) -> Vec<f32> {
        match self.module.order.sources(values.len()) {
            Some(sources) if self.module.kind != Kind::Lookup => {
                sources.into_iter().map(|source| values[source]).collect()
            }
            _ => values,
        }
    }
}

/// Whether a part leaves the model as it is.
pub(super) fn changes_nothing<M: Cut>(part: &LoraPart<M>) -> bool {
    let is_null =
        |low_rank: &LowRank<M>| low_rank.scale == 0.0 || low_rank.a.is_zero() || low_rank.b.is_zero();
    part.rows.is_none()
        && part.magnitude.is_none()
        && part.low_rank.as_ref().is_none_or(is_null)
        && part.bias.as_ref().is_none_or(|bias| bias.iter().all(|x| *x == 0.0))
}

/// A matrix with the rows of both, those of `more` last.
pub(super) fn stacked(first: &HostTensor<'_>, more: &[f32]) -> HostTensor<'static> {
    let more = encoded([more.len() / first.cols, first.cols], more, first.dtype);
    let data = [&first.data[..], &more.data[..]].concat();
    HostTensor { dtype: first.dtype, rows: first.rows + more.rows, cols: first.cols, data: data.into() }
}

/// A matrix with the columns of both, those of `more` last.
pub(super) fn beside(first: &HostTensor<'_>, more: &[f32]) -> HostTensor<'static> {
    let more = encoded([first.rows, more.len() / first.rows], more, first.dtype);
    let width = |tensor: &HostTensor<'_>| tensor.cols * tensor.dtype.size();
    let rows = first.data.chunks_exact(width(first)).zip(more.data.chunks_exact(width(&more)));
    let data: Vec<u8> = rows.flat_map(|(first, more)| first.iter().chain(more)).copied().collect();
    HostTensor { dtype: first.dtype, rows: first.rows, cols: first.cols + more.cols, data: data.into() }
}
