//! Inference with a KV cache: processing a prompt, decoding one or several sequences token by token, and scoring given
//! text.
//!
//! Keys enter the cache after their norm and rotation. Position p of the cache is position p of the text for as long as
//! the cache lives, so rotating a key once equals the reference's rotating it at every step. All buffers are planned in
//! [`Generator::new`]; a decoded token allocates nothing. Weights are shared and never written.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use ulmus_backend::{Backend, CacheFormat, Heads, IGNORE, Spans, View, ViewMut, WeightFormat};
use ulmus_plan::ModelConfig;

use crate::buffers::{Norms, Planner, RopeTables, heads, read, write};
use crate::error::ModelError;
use crate::params::{LayerLayout, Layout};
use crate::sample::{Sampler, Sampling};

/// Rows of a prompt that pass through the layers at once.
const PROMPT_ROWS: usize = 256;
/// Rows whose logits exist at once while text is scored.
const SCORE_ROWS: usize = 64;

/// A trained model on a device, shared read-only by any number of generators.
#[derive(Debug)]
pub struct Model<B: Backend> {
    backend: B,
    config: ModelConfig,
    format: WeightFormat,
    embedding: B::Weights,
    layers: Vec<Layer<B>>,
    final_norm: B::Buffer<f32>,
}

/// The weights of one layer.
#[derive(Debug)]
struct Layer<B: Backend> {
    heads: Heads,
    ffn: usize,
    qkv: B::Weights,
    /// `[2, H]`: queries, then keys.
    qk_norm: B::Buffer<f32>,
    out_proj: B::Weights,
    proj_1: B::Weights,
    proj_2: B::Weights,
    ffn_norm: B::Buffer<f32>,
    attn_norm: B::Buffer<f32>,
}

impl<B: Backend> Model<B> {
    /// Puts flat weights on the device in float32. `config` has passed [`ModelConfig::check`].
    ///
    /// # Errors
    /// Those of [`Model::in_format`].
    pub fn new(backend: B, config: &ModelConfig, weights: &[f32]) -> Result<Self, ModelError> {
        Self::in_format(backend, config, weights, WeightFormat::F32)
    }

    /// Puts flat weights on the device, matrices in the format `format`. `config` has passed [`ModelConfig::check`].
    ///
    /// # Errors
    /// [`ModelError::Tensors`] if there is not one weight per parameter, or if one is not finite in the format;
    /// [`ModelError::Backend`].
    pub fn in_format(
        backend: B,
        config: &ModelConfig,
        weights: &[f32],
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let backend = backend.with_precision(format.precision());
        let layout = Layout::new(config);
        layout.check_len(weights)?;
        check_values(&layout, weights, format)?;
        let matrix = |at: &Range<usize>, outputs| backend.weights(&weights[at.clone()], outputs, format);
        let vector = |at: &Range<usize>| {
            let mut buffer = backend.allocate(at.len())?;
            backend.upload(write(&mut buffer, at.len()), &weights[at.clone()]);
            Ok::<_, ModelError>(buffer)
        };
        let d = config.model_dim;
        let layer = |at: &LayerLayout| {
            let (heads, ffn) = (heads(at, config.head_dim), at.dims.ffn_dim);
            Ok(Layer {
                heads,
                ffn,
                qkv: matrix(&at.qkv, heads.packed_width())?,
                qk_norm: vector(&at.qk_norm)?,
                out_proj: matrix(&at.out_proj, d)?,
                proj_1: matrix(&at.proj_1, 2 * ffn)?,
                proj_2: matrix(&at.proj_2, d)?,
                ffn_norm: vector(&at.ffn_norm)?,
                attn_norm: vector(&at.attn_norm)?,
            })
        };
        let embedding = matrix(&layout.embedding(), config.vocab_size)?;
        let layers = layout.layers().iter().map(layer).collect::<Result<_, ModelError>>()?;
        let final_norm = vector(&layout.final_norm())?;
        Ok(Self { config: config.clone(), format, embedding, layers, final_norm, backend })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The format of the matrices.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }
}

/// Refuses weights that are not finite in the format of their tensor.
fn check_values(layout: &Layout, weights: &[f32], format: WeightFormat) -> Result<(), ModelError> {
    for tensor in layout.tensors() {
        let format = if tensor.shape.len() > 1 { format } else { WeightFormat::F32 };
        let (values, most) = (&weights[tensor.range.clone()], format.largest());
        let mut refused = values.iter().filter(|value| !value.is_finite() || value.abs() > most);
        if let Some(value) = refused.next() {
            let bad = 1 + refused.count();
            let name = &tensor.name;
            return Err(ModelError::Tensors(format!(
                "{name} has {bad} values outside the finite range of {format} (±{most:e}), the first is {value}"
            )));
        }
    }
    Ok(())
}

/// Generates texts: one, or several *sequences* side by side, each with its own length.
///
/// A sequence gets the same bits whatever the others are.
#[derive(Debug)]
pub struct Generator<B: Backend> {
    model: Arc<Model<B>>,
    capacity: usize,
    /// The number of tokens in the cache, of each sequence.
    positions: Vec<usize>,
    /// The integers that a pass reads: the sequences it continues, the positions it continues them from, and the
    /// tokens.
    words: Vec<u32>,
    words_on_device: B::Buffer<u32>,
    /// CUDA graphs of the passes in which one sequence, two, ... get a token each.
    graphs: Vec<B::Graph>,
    rope: RopeTables<B>,
    /// One cache per layer.
    cache: Vec<B::Cache>,
    targets: B::Buffer<u32>,
    stream: B::Activations,
    middle: B::Activations,
    normed: B::Activations,
    packed: B::Activations,
    rotated: B::Activations,
    attended: B::Activations,
    branch: B::Activations,
    gate_up: B::Activations,
    gated: B::Activations,
    norms: Norms<B>,
    cross_entropy: B::Buffer<f32>,
    logits: B::Buffer<f32>,
    /// The tokens of a pass that gives each sequence one.
    tokens: Vec<u32>,
    /// The logits after the last tokens fed, on the host.
    next: Vec<f32>,
    /// The likeliest tokens, on the device and (`greedy`) on the host.
    likeliest: B::Buffer<u32>,
    greedy: Vec<u32>,
}

impl<B: Backend> Generator<B> {
    /// Plans a generator for one text of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`ModelError::Backend`].
    pub fn new(model: Arc<Model<B>>, capacity: usize) -> Result<Self, ModelError> {
        Self::with_sequences(model, capacity, 1)
    }

    /// Plans a generator for `sequences` texts (at least one) of up to `capacity` tokens each.
    ///
    /// # Errors
    /// [`ModelError::Backend`].
    pub fn with_sequences(
        model: Arc<Model<B>>,
        capacity: usize,
        sequences: usize,
    ) -> Result<Self, ModelError> {
        let sequences = sequences.max(1);
        let plan = &mut Planner::new(&model.backend);
        let config = &model.config;
        let (d, rows) = (config.model_dim, PROMPT_ROWS.min(capacity).max(sequences));
        let widest = |width: &dyn Fn(&Layer<B>) -> usize| model.layers.iter().map(width).max().unwrap_or(0);
        let packed = widest(&|layer| layer.heads.packed_width());
        let query_heads = widest(&|layer| layer.heads.query);
        let ffn = widest(&|layer| layer.ffn);
        let format = CacheFormat::beside(model.format);
        let cache = |layer: &Layer<B>| model.backend.cache(sequences, capacity, layer.heads, format);
        let cache = model.layers.iter().map(cache).collect::<Result<_, _>>()?;
        Ok(Self {
            capacity,
            positions: vec![0; sequences],
            words: Vec::with_capacity(2 * sequences + rows),
            words_on_device: plan.buffer(2 * sequences + rows)?,
            graphs: (0..sequences).map(|_| B::Graph::default()).collect(),
            cache,
            rope: RopeTables::new(plan, config, capacity)?,
            targets: plan.buffer(rows)?,
            stream: plan.activations(rows * d)?,
            middle: plan.activations(rows * d)?,
            normed: plan.activations(rows * d)?,
            packed: plan.activations(rows * packed)?,
            rotated: plan.activations(rows * packed)?,
            attended: plan.activations(rows * query_heads * config.head_dim)?,
            branch: plan.activations(rows * d)?,
            gate_up: plan.activations(rows * 2 * ffn)?,
            gated: plan.activations(rows * ffn)?,
            norms: Norms::new(plan, config, rows)?,
            cross_entropy: plan.buffer(rows)?,
            logits: plan.buffer(SCORE_ROWS.max(sequences) * config.vocab_size)?,
            tokens: Vec::with_capacity(sequences),
            next: vec![0.0; sequences * config.vocab_size],
            likeliest: plan.buffer(sequences)?,
            greedy: vec![0; sequences],
            model,
        })
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.positions.len()
    }

    /// The number of tokens fed to the first sequence since the start or the last [`Generator::reset`].
    pub fn position(&self) -> usize {
        self.positions[0]
    }

    /// The most tokens that a text may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens, to begin new texts.
    pub fn reset(&mut self) {
        self.positions.fill(0);
    }

    /// Appends tokens to the first sequence (a whole prompt, or one decoded token) and returns the logits
    /// `[vocabulary]` of the token that follows.
    ///
    /// # Errors
    /// [`ModelError::Batch`] if there is no token, one is outside the vocabulary, or the text becomes too long.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.feed_to(0, tokens)
    }

    /// Does the same as [`Generator::feed`] for one of the sequences.
    ///
    /// # Errors
    /// Those of [`Generator::feed`], and [`ModelError::Batch`] if there is no such sequence.
    pub fn feed_to(&mut self, sequence: usize, tokens: &[u32]) -> Result<&[f32], ModelError> {
        self.check(sequence, tokens, &[])?;
        for part in tokens.chunks(PROMPT_ROWS) {
            self.advance([sequence].into_iter(), part);
        }
        let rows = (tokens.len() - 1) % PROMPT_ROWS + 1;
        if rows > 1 {
            let model = Arc::clone(&self.model);
            model.backend.run(|| self.head(rows - 1..rows));
        }
        Ok(self.logits(1))
    }

    /// Appends one token to each of some sequences and returns the logits of the tokens that follow,
    /// `[tokens.len(), vocabulary]`.
    ///
    /// # Errors
    /// Those of [`Generator::feed_to`], and [`ModelError::Batch`] if a sequence is named twice.
    pub fn feed_each(&mut self, tokens: &[(usize, u32)]) -> Result<&[f32], ModelError> {
        self.advance_each(tokens)?;
        Ok(self.logits(tokens.len()))
    }

    /// Appends one token to each of some sequences and returns, for each, the likeliest token that follows. The logits
    /// stay on the device.
    ///
    /// # Errors
    /// Those of [`Generator::feed_each`].
    pub fn feed_greedy(&mut self, tokens: &[(usize, u32)]) -> Result<&[u32], ModelError> {
        self.advance_each(tokens)?;
        let (count, vocabulary) = (tokens.len(), self.model.config.vocab_size);
        let Self { model, likeliest, logits, greedy, .. } = self;
        let logits = read(logits, count * vocabulary);
        model.backend.run(|| model.backend.greedy(write(likeliest, count), logits));
        model.backend.download(read(likeliest, count), &mut greedy[..count]);
        Ok(&greedy[..count])
    }

    fn advance_each(&mut self, tokens: &[(usize, u32)]) -> Result<(), ModelError> {
        for (index, (sequence, token)) in tokens.iter().enumerate() {
            self.check(*sequence, std::slice::from_ref(token), &[])?;
            if tokens[..index].iter().any(|(before, _)| before == sequence) {
                return Err(ModelError::Batch(format!("sequence {sequence} gets two tokens at once")));
            }
        }
        if tokens.is_empty() {
            return Err(ModelError::Batch("there is no token to feed".to_owned()));
        }
        let mut next = std::mem::take(&mut self.tokens);
        next.clear();
        next.extend(tokens.iter().map(|(_, token)| token));
        self.advance(tokens.iter().map(|(sequence, _)| *sequence), &next);
        self.tokens = next;
        Ok(())
    }

    /// Computes the logits of some rows that have passed all layers.
    fn head(&mut self, rows: Range<usize>) {
        let Self { model, normed, logits, .. } = self;
        let (d, vocabulary) = (model.config.model_dim, model.config.vocab_size);
        model.backend.logits(
            write(logits, rows.len() * vocabulary),
            View::new(normed, rows.start * d..rows.end * d),
            &model.embedding,
            rows.len(),
        );
    }

    /// Copies the first rows of logits to the host.
    fn logits(&mut self, rows: usize) -> &[f32] {
        let len = rows * self.model.config.vocab_size;
        self.model.backend.download(read(&self.logits, len), &mut self.next[..len]);
        &self.next[..len]
    }

    /// Appends tokens to the first sequence and returns, for each, the negative log-likelihood in nats of its target
    /// (the token that follows it in the text being scored); 0 where the target is [`IGNORE`].
    ///
    /// # Errors
    /// Those of [`Generator::feed`], and [`ModelError::Batch`] if there is not one target per token.
    pub fn score(&mut self, tokens: &[u32], targets: &[u32]) -> Result<Vec<f32>, ModelError> {
        if tokens.len() != targets.len() {
            return Err(ModelError::Batch(format!("{} targets for {} tokens", targets.len(), tokens.len())));
        }
        self.check(0, tokens, targets)?;
        let model = Arc::clone(&self.model);
        let vocabulary = model.config.vocab_size;
        let mut losses = vec![0.0; tokens.len()];
        let parts = tokens.chunks(PROMPT_ROWS).zip(targets.chunks(PROMPT_ROWS));
        for ((tokens, targets), losses) in parts.zip(losses.chunks_mut(PROMPT_ROWS)) {
            let rows = tokens.len();
            self.advance([0].into_iter(), tokens);
            model.backend.upload(write(&mut self.targets, rows), targets);
            model.backend.run(|| {
                for start in (0..rows).step_by(SCORE_ROWS) {
                    let end = rows.min(start + SCORE_ROWS);
                    let len = (end - start) * vocabulary;
                    self.head(start..end);
                    model.backend.cross_entropy(
                        ViewMut::new(&mut self.cross_entropy, start..end),
                        write(&mut self.logits, len),
                        View::new(&self.targets, start..end),
                    );
                }
            });
            model.backend.download(read(&self.cross_entropy, rows), losses);
        }
        Ok(losses)
    }

    /// Feeds the prompt to the first sequence and then decodes greedily, up to `max_tokens` tokens or until `stop`,
    /// which is not passed on. Each token is passed to `on_token` as soon as it is known; `Break` ends the text.
    ///
    /// # Errors
    /// Those of [`Generator::feed`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        stop: Option<u32>,
        on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        self.generate_with(&mut Sampler::new(Sampling::default(), 0, 0), prompt, max_tokens, stop, on_token)
    }

    /// Does the same as [`Generator::generate`], with tokens that `sampler` chooses.
    ///
    /// # Errors
    /// Those of [`Generator::feed`].
    pub fn generate_with(
        &mut self,
        sampler: &mut Sampler,
        prompt: &[u32],
        max_tokens: usize,
        stop: Option<u32>,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(), ModelError> {
        if max_tokens == 0 {
            return Ok(());
        }
        let mut token = sampler.choose(self.feed(prompt)?);
        for made in 1..=max_tokens {
            if Some(token) == stop || on_token(token).is_break() || made == max_tokens {
                break;
            }
            token = if sampler.is_greedy() {
                self.feed_greedy(&[(0, token)])?[0]
            } else {
                sampler.choose(self.feed(&[token])?)
            };
        }
        Ok(())
    }

    fn check(&self, sequence: usize, tokens: &[u32], targets: &[u32]) -> Result<(), ModelError> {
        let vocabulary = self.model.config.vocab_size;
        let Some(position) = self.positions.get(sequence) else {
            let most = self.positions.len();
            return Err(ModelError::Batch(format!(
                "there is no sequence {sequence}: there are {most}, numbered from 0"
            )));
        };
        let unknown = |token: &&u32| **token as usize >= vocabulary;
        let problem = if tokens.is_empty() {
            "a text needs at least one token before another can follow".to_owned()
        } else if position + tokens.len() > self.capacity {
            let (have, more, most) = (position, tokens.len(), self.capacity);
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

    /// Appends tokens to some sequences, the same number to each, and sends them through all layers; leaves the final
    /// norm's output in `normed`. If each gets one token, computes the logits, too.
    fn advance(&mut self, sequences: impl Iterator<Item = usize>, tokens: &[u32]) {
        let model = Arc::clone(&self.model);
        let words = &mut self.words;
        words.clear();
        words.extend(sequences.map(|sequence| sequence as u32));
        let (spans, rows) = (words.len(), tokens.len());
        let length = rows / spans;
        for span in 0..spans {
            let position = &mut self.positions[words[span] as usize];
            words.push(*position as u32);
            *position += length;
        }
        words.extend(tokens);
        model.backend.upload(write(&mut self.words_on_device, words.len()), words);
        if length > 1 {
            return model.backend.run(|| self.layers(spans, length));
        }
        // Passes that decode are all alike, and can be replayed.
        let mut graph = std::mem::take(&mut self.graphs[spans - 1]);
        model.backend.replay(&mut graph, || {
            self.layers(spans, 1);
            self.head(0..spans);
        });
        self.graphs[spans - 1] = graph;
    }

    /// Computes the output of the final norm from the token ids of some spans.
    fn layers(&mut self, spans: usize, length: usize) {
        let Self { model, rope, cache, words_on_device, stream, middle, normed, packed, rotated, .. } = self;
        let Self { attended, branch, gate_up, gated, norms, .. } = self;
        let (backend, d, rows) = (&model.backend, model.config.model_dim, spans * length);
        let sequences = || read(words_on_device, spans);
        let positions = || View::new(words_on_device, spans..2 * spans);
        let ids = View::new(words_on_device, 2 * spans..2 * spans + rows);
        backend.embed_weights(write(stream, rows * d), &model.embedding, ids);
        for (index, (layer, cache)) in model.layers.iter().zip(cache).enumerate() {
            let (heads, ffn) = (layer.heads, layer.ffn);
            let (width, query_width) = (heads.packed_width(), heads.query_width());
            let attn_norm = norms.of(read(&layer.attn_norm, d));
            if index == 0 {
                backend.norm(write(normed, rows * d), read(stream, rows * d), attn_norm);
            } else {
                backend.add_norm(
                    write(stream, rows * d),
                    write(normed, rows * d),
                    read(middle, rows * d),
                    read(branch, rows * d),
                    attn_norm,
                );
            }
            backend.linear_weights(write(packed, rows * width), read(normed, rows * d), &layer.qkv, rows);
            backend.qk_norm_rope(
                write(rotated, rows * width),
                read(packed, rows * width),
                norms.of(read(&layer.qk_norm, 2 * heads.width)),
                rope.at(positions(), length),
                heads,
            );
            backend.cached_attention(
                write(attended, rows * query_width),
                cache,
                read(rotated, rows * width),
                Spans { sequences: sequences(), first: positions(), length },
            );
            let attended = read(attended, rows * query_width);
            backend.linear_weights(write(branch, rows * d), attended, &layer.out_proj, rows);
            backend.add_norm(
                write(middle, rows * d),
                write(normed, rows * d),
                read(stream, rows * d),
                read(branch, rows * d),
                norms.of(read(&layer.ffn_norm, d)),
            );
            let normed = read(normed, rows * d);
            backend.linear_weights(write(gate_up, rows * 2 * ffn), normed, &layer.proj_1, rows);
            backend.swiglu(write(gated, rows * ffn), read(gate_up, rows * 2 * ffn), ffn);
            backend.linear_weights(write(branch, rows * d), read(gated, rows * ffn), &layer.proj_2, rows);
        }
        backend.add_norm(
            write(stream, rows * d),
            write(normed, rows * d),
            read(middle, rows * d),
            read(branch, rows * d),
            norms.of(read(&model.final_norm, d)),
        );
    }
}
