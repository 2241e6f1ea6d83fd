//! Norms of rows by themselves, after a residual add, and of heads before the rotary embedding.
//!
//! [`fused`] and [`heads`] read a row once, for any kind of norm. [`naive`] and [`naive_heads`] exist for comparison,
//! and consist of [`passes`] over whole tensors.

mod fused;
mod heads;
mod naive;
mod naive_heads;
mod passes;
mod rope;
mod row;
mod rows;

pub(crate) use rope::RopeTables;
use ulmus_backend::Heads;
use ulmus_plan::NormKind;

/// A norm: its kind, its weights, and the scratch memory in which the forward pass leaves results for the backward
/// pass.
pub(crate) struct Norm<'a> {
    pub kind: NormKind,
    pub weight: &'a [f32],
    pub scratch: &'a mut [f32],
}

impl Norm<'_> {
    /// `out = norm(x)`.
    pub(crate) fn forward(self, out: &mut [f32], x: &[f32]) {
        let Self { kind, weight, scratch } = self;
        match kind {
            NormKind::Rms => fused::norm::<false>(out, x, weight),
            NormKind::Layer => fused::norm::<true>(out, x, weight),
            NormKind::NaiveRms => naive::norm(out, x, weight, scratch),
        }
    }

    /// `sum = x + delta`, `out = norm(sum)`.
    pub(crate) fn add_forward(self, sum: &mut [f32], out: &mut [f32], x: &[f32], delta: &[f32]) {
        let Self { kind, weight, scratch } = self;
        match kind {
            NormKind::Rms => fused::add_norm::<false>(sum, out, x, delta, weight),
            NormKind::Layer => fused::add_norm::<true>(sum, out, x, delta, weight),
            NormKind::NaiveRms => naive::add_norm(sum, out, x, delta, weight, scratch),
        }
    }

    /// Computes the gradients of the norm; that of its weights only if it is asked for.
    pub(crate) fn backward(
        self,
        x_gradient: &mut [f32],
        weight_gradient: Option<&mut [f32]>,
        gradient: &[f32],
        x: &[f32],
        accumulate: bool,
    ) {
        let Self { kind, weight, scratch } = self;
        let backward = match kind {
            NormKind::Rms => fused::norm_backward::<false>,
            NormKind::Layer => fused::norm_backward::<true>,
            NormKind::NaiveRms => naive::norm_backward,
        };
        backward(x_gradient, weight_gradient, gradient, x, weight, accumulate, scratch);
    }

    /// Normalises and rotates query and key heads, and copies value heads. The weights are `[2, H]`.
    pub(crate) fn heads(self, out: &mut [f32], packed: &[f32], rope: RopeTables<'_>, heads: Heads) {
        let Self { kind, weight, scratch } = self;
        match kind {
            NormKind::Rms => heads::qk_norm_rope::<false>(out, packed, weight, rope, heads),
            NormKind::Layer => heads::qk_norm_rope::<true>(out, packed, weight, rope, heads),
            NormKind::NaiveRms => naive_heads::qk_norm_rope(out, packed, weight, rope, heads, scratch),
        }
    }

    /// Computes the gradients of [`Norm::heads`]; that of `packed` replaces it.
    pub(crate) fn heads_backward(
        self,
        packed: &mut [f32],
        weights_gradient: Option<&mut [f32]>,
        gradient: &[f32],
        rope: RopeTables<'_>,
        heads: Heads,
    ) {
        let Self { kind, weight, scratch } = self;
        let backward = match kind {
            NormKind::Rms => heads::qk_norm_rope_backward::<false>,
            NormKind::Layer => heads::qk_norm_rope_backward::<true>,
            NormKind::NaiveRms => naive_heads::qk_norm_rope_backward,
        };
        backward(packed, weights_gradient, gradient, weight, rope, heads, scratch);
    }
}
