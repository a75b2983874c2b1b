//! The default of [`Ops::linear`]: every [`Output`] as a sequence of simpler operations, for
//! devices that do not fuse it.

use crate::{Branch, Ops, Output, Projection, Residual, Result};

/// Computes [`Ops::linear`] one operation after the other.
pub fn linear<B: Ops>(be: &B, x: &B::Mat, by: Projection<'_, B>, out: Output<'_, B>) -> Result<()> {
    match out {
        Output::Store(y) => be.matmul(x, by, y),
        Output::Activate { activation, products, y } => {
            be.matmul(x, by, products)?;
            be.activate(products, activation, y)
        }
        Output::Gate { activation, products, y } => {
            be.matmul(x, by, products)?;
            be.gate(products, activation, y)
        }
        Output::Residual(residual) => add_and_norm(be, x, by, residual),
        Output::Logits { y, shape } => be.logits(x, by, shape, y),
    }
}

/// Whether products can be added to the residual stream directly, because nothing else is done with them first.
pub fn adds_directly<B: Ops>(be: &B, by: &Projection<'_, B>, to: &Residual<'_, B>) -> bool {
    let scales = by.lora.as_ref().is_some_and(|lora| be.scales(lora));
    to.post.is_none() && to.scale == 1.0 && be.ranks() == 1 && !scales
}

fn add_and_norm<B: Ops>(be: &B, x: &B::Mat, by: Projection<'_, B>, to: Residual<'_, B>) -> Result<()> {
    let sums_both = be.ranks() > 1 && to.post.is_none();
    match to.branch {
        Branch::First if sums_both => return be.matmul(x, by, to.products),
        Branch::Second if sums_both => {
            if by.lora.as_ref().is_some_and(|lora| be.scales(lora)) {
                // These products must be complete before anything is added to them.
                be.all_reduce(to.products)?;
                be.add(to.products, None, to.scale, to.stream)?;
                be.matmul(x, by, to.products)?;
            } else {
                be.matmul_add(x, by, to.products)?;
            }
            be.all_reduce(to.products)?;
            be.add(to.products, None, to.scale, to.stream)?;
        }
        _ if adds_directly(be, &by, &to) => be.matmul_add(x, by, to.stream)?,
        _ => {
            be.matmul(x, by, to.products)?;
            be.all_reduce(to.products)?;
            be.add(to.products, to.post, to.scale, to.stream)?;
        }
    }
    match to.next {
        Some((norm, y)) => be.normalize(to.stream, norm, y),
        None => Ok(()),
    }
}
