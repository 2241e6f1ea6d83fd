//! Inference with a KV cache: prompt processing, decoding one token at a time, scoring of given text.
//!
//! Keys enter the cache after their norm and rotation: position p of the cache is position p of the text for as
//! long as the cache lives, so rotating once is the same as the reference's rotating at every step. All buffers
//! are planned in [`Generator::new`]; a decoded token allocates nothing. Weights are shared and never written.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use ulmus_plan::ModelConfig;

use crate::backend::{AttentionShape, Backend, Columns, IGNORE, LinearShape, View, ViewMut};
use crate::error::ModelError;
use crate::network::{Planner, RopeTables, heads, read, write};
use crate::params::Layout;

/// Rows of a prompt that go through the layers at once.
const PROMPT_ROWS: usize = 256;
/// Rows whose logits exist at once while text is scored.
const SCORE_ROWS: usize = 64;

/// A trained model on a device, read only, for any number of generators.
#[derive(Debug)]
pub struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    layout: Layout,
    weights: B::Buffer<f32>,
}

impl<B: Backend> Model<B> {
    /// Puts flat weights on the device. `config` has passed [`ModelConfig::check`].
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if there is not one weight per parameter; [`ModelError::OutOfMemory`].
    pub fn new(backend: B, config: &ModelConfig, weights: &[f32]) -> Result<Self, ModelError> {
        let layout = Layout::new(config);
        layout.check_len(weights)?;
        let mut buffer = backend.allocate(weights.len())?;
        backend.upload(write(&mut buffer, weights.len()), weights);
        Ok(Self { backend, config: config.clone(), layout, weights: buffer })
    }

    /// Shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    fn weight(&self, range: &Range<usize>) -> View<'_, B::Buffer<f32>> {
        View::new(&self.weights, range.clone())
    }
}

/// One text in the making.
#[derive(Debug)]
pub struct Generator<B: Backend> {
    model: Arc<Model<B>>,
    capacity: usize,
    /// Tokens in the cache.
    position: usize,
    rope: RopeTables<B>,
    /// Per layer `[capacity, keys | values]`.
    cache: Vec<B::Buffer<f32>>,
    ids: B::Buffer<u32>,
    targets: B::Buffer<u32>,
    stream: B::Buffer<f32>,
    next_stream: B::Buffer<f32>,
    normed: B::Buffer<f32>,
    packed: B::Buffer<f32>,
    rotated: B::Buffer<f32>,
    attended: B::Buffer<f32>,
    lse: B::Buffer<f32>,
    branch: B::Buffer<f32>,
    gate_up: B::Buffer<f32>,
    gated: B::Buffer<f32>,
    cross_entropy: B::Buffer<f32>,
    logits: B::Buffer<f32>,
    /// Logits of the last token fed, on the host.
    next: Vec<f32>,
}

impl<B: Backend> Generator<B> {
    /// Plans a generator for texts of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`].
    pub fn new(model: Arc<Model<B>>, capacity: usize) -> Result<Self, ModelError> {
        let plan = &mut Planner::new(&model.backend);
        let config = &model.config;
        let (d, rows) = (config.model_dim, PROMPT_ROWS.min(capacity));
        let layers = model.layout.layers();
        let widest = |width: &dyn Fn(&crate::params::LayerLayout) -> usize| {
            layers.iter().map(width).max().unwrap_or(0)
        };
        let head = |layer: &crate::params::LayerLayout| heads(layer, config.head_dim);
        let packed = widest(&|layer| head(layer).packed_width());
        let query_heads = widest(&|layer| layer.dims.q_heads);
        let ffn = widest(&|layer| layer.dims.ffn_dim);
        let cache = layers.iter().map(|layer| plan.buffer(capacity * 2 * head(layer).key_value_width()));
        Ok(Self {
            capacity,
            position: 0,
            cache: cache.collect::<Result<_, _>>()?,
            rope: RopeTables::new(plan, config, capacity)?,
            ids: plan.buffer(rows)?,
            targets: plan.buffer(rows)?,
            stream: plan.buffer(rows * d)?,
            next_stream: plan.buffer(rows * d)?,
            normed: plan.buffer(rows * d)?,
            packed: plan.buffer(rows * packed)?,
            rotated: plan.buffer(rows * packed)?,
            attended: plan.buffer(rows * query_heads * config.head_dim)?,
            lse: plan.buffer(rows * query_heads)?,
            branch: plan.buffer(rows * d)?,
            gate_up: plan.buffer(rows * 2 * ffn)?,
            gated: plan.buffer(rows * ffn)?,
            cross_entropy: plan.buffer(rows)?,
            logits: plan.buffer(SCORE_ROWS * config.vocab_size)?,
            next: vec![0.0; config.vocab_size],
            model,
        })
    }

    /// Tokens fed since the start or the last [`Generator::reset`].
    pub fn position(&self) -> usize {
        self.position
    }

    /// Most tokens that a text may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Begins a new text.
    pub fn reset(&mut self) {
        self.position = 0;
    }

    /// Appends tokens to the text (a whole prompt, or one decoded token) and gives the logits `[vocabulary]` of
    /// the token that follows.
    ///
    /// # Errors
    /// [`ModelError::Batch`] if there is no token, one is outside the vocabulary, or the text becomes too long.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.check(tokens, &[])?;
        let model = Arc::clone(&self.model);
        let (d, vocabulary) = (model.config.model_dim, model.config.vocab_size);
        model.backend.run(|| {
            let mut rows = 0;
            for part in tokens.chunks(PROMPT_ROWS) {
                self.advance(part);
                rows = part.len();
            }
            model.backend.linear(
                write(&mut self.logits, vocabulary),
                View::new(&self.normed, (rows - 1) * d..rows * d),
                model.weight(&model.layout.embedding()),
                LinearShape { rows: 1, inputs: d, outputs: vocabulary },
            );
        });
        model.backend.download(read(&self.logits, vocabulary), &mut self.next);
        Ok(&self.next)
    }

    /// Appends tokens to the text and gives, for each, the negative log-likelihood in nats of its target (the
    /// token that follows it in the text being scored); 0 where the target is [`IGNORE`].
    ///
    /// # Errors
    /// As for [`Generator::feed`], and if there is not one target per token.
    pub fn score(&mut self, tokens: &[u32], targets: &[u32]) -> Result<Vec<f32>, ModelError> {
        if tokens.len() != targets.len() {
            return Err(ModelError::Batch(format!("{} targets for {} tokens", targets.len(), tokens.len())));
        }
        self.check(tokens, targets)?;
        let model = Arc::clone(&self.model);
        let (d, vocabulary) = (model.config.model_dim, model.config.vocab_size);
        let mut losses = vec![0.0; tokens.len()];
        let parts = tokens.chunks(PROMPT_ROWS).zip(targets.chunks(PROMPT_ROWS));
        for ((tokens, targets), losses) in parts.zip(losses.chunks_mut(PROMPT_ROWS)) {
            let rows = tokens.len();
            model.backend.run(|| {
                self.advance(tokens);
                model.backend.upload(write(&mut self.targets, rows), targets);
                model.backend.head_loss(
                    write(&mut self.cross_entropy, rows),
                    write(&mut self.lse, rows),
                    None,
                    read(&self.normed, rows * d),
                    model.weight(&model.layout.embedding()),
                    read(&self.targets, rows),
                    write(&mut self.logits, SCORE_ROWS * vocabulary),
                    LinearShape { rows, inputs: d, outputs: vocabulary },
                );
            });
            model.backend.download(read(&self.cross_entropy, rows), losses);
        }
        Ok(losses)
    }

    /// Feeds the prompt and then decodes greedily, up to `max_tokens` tokens or until `stop`, which is not
    /// given out. Each token is passed to `on_token` as soon as it is known; `Break` ends the text.
    ///
    /// # Errors
    /// As for [`Generator::feed`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        stop: Option<u32>,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        if max_tokens == 0 {
            return Ok(());
        }
        let mut token = greedy(self.feed(prompt)?);
        for made in 1..=max_tokens {
            if Some(token) == stop || on_token(token).is_break() || made == max_tokens {
                break;
            }
            token = greedy(self.feed(&[token])?);
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32], targets: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.model.config.vocab_size;
        let unknown = |token: &&u32| **token as usize >= vocabulary;
        let problem = if tokens.is_empty() {
            "a text needs at least one token before another can follow".to_owned()
        } else if self.position + tokens.len() > self.capacity {
            let (have, more, most) = (self.position, tokens.len(), self.capacity);
            format!("{have} tokens and {more} more do not fit a text of at most {most}; use a shorter prompt")
        } else if let Some(token) =
            tokens.iter().chain(targets.iter().filter(|t| **t != IGNORE)).find(unknown)
        {
            format!("token {token} is outside the vocabulary of {vocabulary}")
        } else {
            return Ok(());
        };
        Err(ModelError::Batch(problem))
    }

    /// Sends up to [`PROMPT_ROWS`] tokens through all layers; leaves the final norm's output in `normed`.
    fn advance(&mut self, tokens: &[u32]) {
        let Self { model, rope, cache, ids, stream, next_stream, normed, packed, rotated, .. } = self;
        let Self { attended, lse, branch, gate_up, gated, position, .. } = self;
        let (backend, d, rows) = (&model.backend, model.config.model_dim, tokens.len());
        backend.upload(write(ids, rows), tokens);
        backend.embed(write(stream, rows * d), model.weight(&model.layout.embedding()), read(ids, rows), d);
        for (index, (at, cache)) in model.layout.layers().iter().zip(cache).enumerate() {
            let heads = heads(at, model.config.head_dim);
            let (width, query_width, ffn) = (heads.packed_width(), heads.query_width(), at.dims.ffn_dim);
            let cached = 2 * heads.key_value_width();
            if index == 0 {
                backend.norm(write(normed, rows * d), read(stream, rows * d), model.weight(&at.attn_norm));
            } else {
                backend.add_norm(
                    write(next_stream, rows * d),
                    write(normed, rows * d),
                    read(stream, rows * d),
                    read(branch, rows * d),
                    model.weight(&at.attn_norm),
                );
                std::mem::swap(stream, next_stream);
            }
            backend.linear(
                write(packed, rows * width),
                read(normed, rows * d),
                model.weight(&at.qkv),
                LinearShape { rows, inputs: d, outputs: width },
            );
            backend.qk_norm_rope(
                write(rotated, rows * width),
                read(packed, rows * width),
                model.weight(&at.qk_norm),
                rope.at(*position, rows),
                heads,
            );
            let columns = |column| Columns { rows: read(&*rotated, rows * width), stride: width, column };
            backend.copy_columns(
                ViewMut::new(cache, *position * cached..(*position + rows) * cached),
                columns(query_width),
                cached,
            );
            let keys = *position + rows;
            let kept = |column| Columns { rows: read(&*cache, keys * cached), stride: cached, column };
            backend.attention(
                write(attended, rows * query_width),
                write(lse, rows * heads.query),
                columns(0),
                kept(0),
                kept(heads.key_value_width()),
                None,
                AttentionShape { sequences: 1, queries: rows, keys, heads },
            );
            backend.linear(
                write(branch, rows * d),
                read(attended, rows * query_width),
                model.weight(&at.out_proj),
                LinearShape { rows, inputs: query_width, outputs: d },
            );
            backend.add_norm(
                write(next_stream, rows * d),
                write(normed, rows * d),
                read(stream, rows * d),
                read(branch, rows * d),
                model.weight(&at.ffn_norm),
            );
            std::mem::swap(stream, next_stream);
            backend.linear(
                write(gate_up, rows * 2 * ffn),
                read(normed, rows * d),
                model.weight(&at.proj_1),
                LinearShape { rows, inputs: d, outputs: 2 * ffn },
            );
            backend.swiglu(write(gated, rows * ffn), read(gate_up, rows * 2 * ffn), ffn);
            backend.linear(
                write(branch, rows * d),
                read(gated, rows * ffn),
                model.weight(&at.proj_2),
                LinearShape { rows, inputs: ffn, outputs: d },
            );
        }
        backend.add_norm(
            write(next_stream, rows * d),
            write(normed, rows * d),
            read(stream, rows * d),
            read(branch, rows * d),
            model.weight(&model.layout.final_norm()),
        );
        *position += rows;
    }
}

/// The likeliest token; of equal ones the first.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = |best: (usize, f32), (token, logit): (usize, &f32)| {
        if *logit > best.1 { (token, *logit) } else { best }
    };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), best).0 as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(greedy(&[0.5, 2.0, 2.0, -1.0]), 1);
        assert_eq!(greedy(&[f32::NAN, -3.0]), 1);
    }
}
