//! An independent implementation of OpenELM's loss and gradients, with candle's tensors and automatic differentiation
//! in f64. It is slow and simple, and tests compare the model crate with it.

use candle_core::{D, Device, Error, Result, Tensor, Var};
use ulmus_backend::IGNORE;
use ulmus_model::MicroBatch;
use ulmus_plan::{ModelConfig, NormKind};

/// A model with one variable per tensor.
#[derive(Debug)]
pub struct Oracle {
    config: ModelConfig,
    variables: Vec<(String, Var)>,
}

/// The losses and gradients of a batch.
#[derive(Debug)]
pub struct Losses {
    /// Sum of the cross-entropies of valid tokens, in nats.
    pub cross_entropy: f64,
    /// Sum of the squared logsumexps of valid tokens.
    pub z: f64,
    /// The gradient of `cross_entropy + z_loss · z` for each tensor, in the order in which tensors were given.
    pub gradients: Vec<Vec<f64>>,
}

impl Oracle {
    /// A model with the given tensors: names as in Hugging Face files, shapes, and values.
    ///
    /// # Errors
    /// Errors of candle, for example if a shape does not fit its values.
    pub fn new<'a>(
        config: &ModelConfig,
        tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    ) -> Result<Self> {
        let variable = |(name, shape, values): (&str, &[usize], &[f32])| {
            let values = values.iter().map(|x| f64::from(*x)).collect();
            Ok((name.to_owned(), Var::from_vec(values, shape, &Device::Cpu)?))
        };
        let variables = tensors.into_iter().map(variable).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), variables })
    }

    /// Computes the losses and gradients of a batch.
    ///
    /// # Errors
    /// Errors of candle, or a tensor that is missing or that the loss does not depend on.
    pub fn losses(&self, batch: &MicroBatch, z_loss: f64) -> Result<Losses> {
        let (cross_entropy, z) = self.forward(batch)?;
        let found = (&cross_entropy + (&z * z_loss)?)?.backward()?;
        let gradient = |(name, variable): &(String, Var)| {
            let gradient =
                found.get(variable).ok_or_else(|| Error::Msg(format!("{name} has no gradient")))?;
            gradient.flatten_all()?.to_vec1()
        };
        Ok(Losses {
            cross_entropy: cross_entropy.to_scalar()?,
            z: z.to_scalar()?,
            gradients: self.variables.iter().map(gradient).collect::<Result<_>>()?,
        })
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        let name = format!("transformer.{name}.weight");
        let found = self.variables.iter().find(|(own, _)| *own == name);
        found
            .map(|(_, variable)| variable.as_tensor())
            .ok_or_else(|| Error::Msg(format!("there is no tensor {name}")))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let (x, epsilon) = match self.config.norm {
            NormKind::Rms | NormKind::NaiveRms => (x.clone(), 1e-6),
            NormKind::Layer => (x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, 1e-5),
        };
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
        x.broadcast_div(&scale)?.broadcast_mul(self.weight(name)?)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        x.broadcast_matmul(&self.weight(name)?.t()?)
    }

    /// `x` is `[sequences, heads, length, head_dim]`.
    fn rope(&self, x: &Tensor) -> Result<Tensor> {
        let (length, half) = (x.dim(2)?, self.config.head_dim / 2);
        let frequency = |j: usize| self.config.rope_freq_constant.powf(-(j as f64) / half as f64);
        let angles: Vec<f64> = (0..length * half).map(|i| (i / half) as f64 * frequency(i % half)).collect();
        let angles = Tensor::from_vec(angles, (length, half), x.device())?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (low, high) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
        let new_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let new_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Tensor::cat(&[new_low, new_high], 3)
    }

    fn attention(&self, x: &Tensor, layer: usize, mask: &Tensor) -> Result<Tensor> {
        let (sequences, length, _) = x.dims3()?;
        let (dims, h) = (self.config.layers()[layer], self.config.head_dim);
        let packed = self.linear(x, &format!("layers.{layer}.attn.qkv_proj"))?;
        let heads = |from: usize, count: usize| {
            packed
                .narrow(2, from * h, count * h)?
                .reshape((sequences, length, count, h))?
                .transpose(1, 2)?
                .contiguous()
        };
        let repeat = |x: Tensor| {
            let groups = dims.q_heads / dims.kv_heads;
            x.unsqueeze(2)?.expand((sequences, dims.kv_heads, groups, length, h))?.reshape((
                sequences,
                dims.q_heads,
                length,
                h,
            ))
        };
        let q = self.rope(&self.norm(&heads(0, dims.q_heads)?, &format!("layers.{layer}.attn.q_norm"))?)?;
        let k = heads(dims.q_heads, dims.kv_heads)?;
        let k = repeat(self.rope(&self.norm(&k, &format!("layers.{layer}.attn.k_norm"))?)?)?;
        let v = repeat(heads(dims.q_heads + dims.kv_heads, dims.kv_heads)?)?;
        let scores =
            (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (h as f64).sqrt())?.broadcast_add(mask)?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&v.contiguous()?)?.transpose(1, 2)?.reshape((
            sequences,
            length,
            dims.q_heads * h,
        ))?;
        self.linear(&out, &format!("layers.{layer}.attn.out_proj"))
    }

    fn ffn(&self, x: &Tensor, layer: usize) -> Result<Tensor> {
        let width = self.config.layers()[layer].ffn_dim;
        let both = self.linear(x, &format!("layers.{layer}.ffn.proj_1"))?;
        let gated = (both.narrow(2, 0, width)?.silu()? * both.narrow(2, width, width)?)?;
        self.linear(&gated, &format!("layers.{layer}.ffn.proj_2"))
    }

    /// The sums of cross-entropies and of squared logsumexps over valid tokens.
    fn forward(&self, batch: &MicroBatch) -> Result<(Tensor, Tensor)> {
        let (device, shape) = (Device::Cpu, (batch.sequences, batch.length));
        let table = self.weight("token_embeddings")?;
        let ids = Tensor::from_slice(&batch.inputs, batch.inputs.len(), &device)?;
        let mut x = table.index_select(&ids, 0)?.reshape((shape.0, shape.1, self.config.model_dim))?;
        let mut mask = Vec::new();
        for (row, start) in batch.doc_starts.iter().enumerate() {
            let query = row % batch.length;
            mask.extend(
                (0..batch.length).map(|key| {
                    if (*start as usize..=query).contains(&key) { 0.0 } else { f64::NEG_INFINITY }
                }),
            );
        }
        let mask = Tensor::from_vec(mask, (shape.0, 1, shape.1, shape.1), &device)?;
        for layer in 0..self.config.num_transformer_layers {
            let normed = self.norm(&x, &format!("layers.{layer}.attn_norm"))?;
            x = (&x + self.attention(&normed, layer, &mask)?)?;
            let normed = self.norm(&x, &format!("layers.{layer}.ffn_norm"))?;
            x = (&x + self.ffn(&normed, layer)?)?;
        }
        let logits = self.norm(&x, "norm")?.broadcast_matmul(&table.t()?)?.flatten_to(1)?;
        let most = logits.max_keepdim(1)?.detach();
        let lse = (logits.broadcast_sub(&most)?.exp()?.sum_keepdim(1)?.log()? + most)?.squeeze(1)?;
        let targets: Vec<u32> = batch.targets.iter().map(|t| if *t == IGNORE { 0 } else { *t }).collect();
        let valid: Vec<f64> = batch.targets.iter().map(|t| f64::from(u8::from(*t != IGNORE))).collect();
        let targets = Tensor::from_vec(targets, (batch.targets.len(), 1), &device)?;
        let valid = Tensor::from_vec(valid, batch.targets.len(), &device)?;
        let at_target = logits.gather(&targets, 1)?.squeeze(1)?;
        let ce = ((&lse - at_target)? * &valid)?.sum_all()?;
        let z = (lse.sqr()? * valid)?.sum_all()?;
        Ok((ce, z))
    }
}
