//! Inference with a KV cache: processing a prompt, decoding one or several sequences token by token, and scoring given
//! text.
//!
//! Keys enter the cache after their norm and rotation. Position p of the cache is position p of the text for as long as
//! the cache lives, so rotating a key once equals the reference's rotating it at every step. All buffers are planned in
//! [`Generator::new`]; a decoded token allocates nothing. Weights are shared and never written.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use ulmus_backend::{Backend, CacheFormat, Forks, Heads, IGNORE, Spans, View, ViewMut, WeightFormat};
use ulmus_plan::ModelConfig;

use crate::buffers::{Norms, Planner, RopeTables, heads, read, write};
use crate::error::ModelError;
use crate::params::{LayerPlaces, Layout, Places};
use crate::sample::{Sampler, Sampling};

/// Rows of a prompt that pass through the layers at once, unless the generator is planned for another number.
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
    /// The head, if it is not the embedding.
    head: Option<B::Weights>,
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
        let (layout, places) = Places::new(config, &[]);
        layout.check_len(weights)?;
        check_values(&layout, weights, format)?;
        let matrix = |at: &Range<usize>, outputs| backend.weights(&weights[at.clone()], outputs, format);
        let vector = |at: &Range<usize>| {
            let mut buffer = backend.allocate(at.len())?;
            backend.upload(write(&mut buffer, at.len()), &weights[at.clone()]);
            Ok::<_, ModelError>(buffer)
        };
        let d = config.model_dim;
        let layer = |at: &LayerPlaces| {
            let (heads, ffn) = (heads(at, config.head_dim), at.dims.ffn_dim);
            Ok(Layer {
                heads,
                ffn,
                qkv: matrix(&at.qkv.weight, heads.packed_width())?,
                qk_norm: vector(&at.qk_norm)?,
                out_proj: matrix(&at.out_proj.weight, d)?,
                proj_1: matrix(&at.proj_1.weight, 2 * ffn)?,
                proj_2: matrix(&at.proj_2.weight, d)?,
                ffn_norm: vector(&at.ffn_norm)?,
                attn_norm: vector(&at.attn_norm)?,
            })
        };
        let embedding = matrix(&places.embedding, config.vocab_size)?;
        let layers = places.layers.iter().map(layer).collect::<Result<_, ModelError>>()?;
        let final_norm = vector(&places.final_norm)?;
        let is_tied = config.share_input_output_layers;
        let head = (!is_tied).then(|| matrix(&places.head, config.vocab_size)).transpose()?;
        Ok(Self { config: config.clone(), format, embedding, layers, final_norm, head, backend })
    }

    /// The matrix that makes logits.
    fn head(&self) -> &B::Weights {
        self.head.as_ref().unwrap_or(&self.embedding)
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

/// Tokens that continue a sequence, and what is asked of the model there.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// The sequence.
    pub sequence: usize,
    /// At least one token.
    pub tokens: &'a [u32],
    /// Pairs of an index in `tokens` and a token whose probability to follow that one is wanted.
    pub targets: &'a [(usize, u32)],
}

/// How likely the model finds a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Negative log-likelihood in nats.
    pub nll: f32,
    /// Whether no token is likelier; of equally likely ones, whether it is the first.
    pub greedy: bool,
}

/// Spans of a pass that have the same length.
#[derive(Debug, Clone, Copy)]
struct Group {
    spans: usize,
    length: usize,
}

/// Generates texts: one, or several *sequences* side by side, each with its own length.
///
/// A sequence gets the same bits whatever the others are.
#[derive(Debug)]
pub struct Generator<B: Backend> {
    model: Arc<Model<B>>,
    capacity: usize,
    /// Bytes of everything below.
    memory: u64,
    /// Rows that pass through the layers at once.
    rows: usize,
    /// The number of tokens in the cache, of each sequence.
    positions: Vec<usize>,
    /// The integers that a pass reads: the sequences it continues, the positions it continues them from, the positions of
    /// all rows, and the tokens.
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
        Self::with_rows(model, capacity, sequences, PROMPT_ROWS.min(capacity))
    }

    /// Plans a generator for `sequences` texts (at least one) of up to `capacity` tokens each, which sends at least `rows`
    /// tokens through the model at once if there are as many.
    ///
    /// # Errors
    /// [`ModelError::Backend`].
    pub fn with_rows(
        model: Arc<Model<B>>,
        capacity: usize,
        sequences: usize,
        rows: usize,
    ) -> Result<Self, ModelError> {
        let sequences = sequences.max(1);
        let plan = &mut Planner::new(&model.backend);
        let config = &model.config;
        let (d, rows) = (config.model_dim, rows.max(sequences));
        let scored = SCORE_ROWS.max(sequences);
        let widest = |width: &dyn Fn(&Layer<B>) -> usize| model.layers.iter().map(width).max().unwrap_or(0);
        let packed = widest(&|layer| layer.heads.packed_width());
        let query_heads = widest(&|layer| layer.heads.query);
        let ffn = widest(&|layer| layer.ffn);
        let format = CacheFormat::beside(model.format);
        let cache = |layer: &Layer<B>| model.backend.cache(sequences, capacity, layer.heads, format);
        let cache = model.layers.iter().map(cache).collect::<Result<_, _>>()?;
        let heads: usize = model.layers.iter().map(|layer| layer.heads.key_value).sum();
        let remembered = 2 * (heads * config.head_dim * capacity * sequences) as u64;
        Ok(Self {
            capacity,
            rows,
            positions: vec![0; sequences],
            words: Vec::with_capacity(3 * sequences + 2 * rows),
            words_on_device: plan.buffer(3 * sequences + 2 * rows)?,
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
            logits: plan.buffer(scored * config.vocab_size)?,
            tokens: Vec::with_capacity(sequences),
            next: vec![0.0; sequences * config.vocab_size],
            likeliest: plan.buffer(scored)?,
            greedy: vec![0; scored],
            // After everything that the plan counts.
            memory: WeightFormat::from(format).bytes(remembered) + plan.bytes,
            model,
        })
    }

    /// Bytes that it takes on the device beside the weights: what it remembers of its texts, activations and logits.
    pub fn memory(&self) -> u64 {
        self.memory
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

    /// The most tokens that pass through the model at once.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Forgets all tokens, to begin new texts.
    pub fn reset(&mut self) {
        self.positions.fill(0);
    }

    /// Forgets the tokens of one sequence.
    ///
    /// # Panics
    /// If there is no such sequence.
    pub fn forget(&mut self, sequence: usize) {
        self.positions[sequence] = 0;
    }

    /// Makes sequences begin like others: for each pair, forgets the second sequence and gives it the tokens of the first.
    ///
    /// # Errors
    /// [`ModelError::Batch`] if there is no such sequence, one is named twice as the second of a pair, or one is the first of
    /// a pair and the second of another.
    pub fn fork(&mut self, pairs: &[(usize, usize)]) -> Result<(), ModelError> {
        let most = self.positions.len();
        if let Some(unknown) = pairs.iter().flat_map(|(from, to)| [from, to]).find(|one| **one >= most) {
            return Err(ModelError::Batch(format!(
                "there is no sequence {unknown}: there are {most}, numbered from 0"
            )));
        }
        for (index, (_, to)) in pairs.iter().enumerate() {
            let is_read = pairs.iter().any(|(from, _)| from == to);
            if is_read || pairs[..index].iter().any(|(_, before)| before == to) {
                return Err(ModelError::Batch(format!(
                    "sequence {to} is copied to, and is part of another copy"
                )));
            }
            self.positions[*to] = self.positions[pairs[index].0];
        }
        let copied = || pairs.iter().filter(|(from, _)| self.positions[*from] > 0);
        let (count, longest) = (copied().count(), copied().map(|(from, _)| self.positions[*from]).max());
        let Some(longest) = longest else { return Ok(()) };
        let words = &mut self.words;
        words.clear();
        words.extend(copied().map(|(from, _)| *from as u32));
        words.extend(copied().map(|(_, to)| *to as u32));
        words.extend(copied().map(|(from, _)| self.positions[*from] as u32));
        let model = Arc::clone(&self.model);
        model.backend.upload(write(&mut self.words_on_device, words.len()), words);
        let Self { cache, words_on_device, .. } = self;
        let words = |index: usize| View::new(&*words_on_device, index * count..(index + 1) * count);
        model.backend.run(|| {
            for cache in cache {
                let forks = Forks { from: words(0), to: words(1), positions: words(2), longest };
                model.backend.fork(cache, forks);
            }
        });
        Ok(())
    }

    /// Appends the tokens of each span to its sequence, and scores the targets of all spans, in order.
    ///
    /// A score has the same bits whatever the other spans are, and however the tokens before it were appended.
    ///
    /// # Errors
    /// Those of [`Generator::feed_to`], and [`ModelError::Batch`] if a sequence has two spans, the spans have more tokens than
    /// [`Generator::rows`], or a target does not follow a token of its span.
    pub fn extend(&mut self, spans: &[Span<'_>]) -> Result<Vec<Score>, ModelError> {
        for (index, span) in spans.iter().enumerate() {
            self.check(span.sequence, span.tokens, &[])?;
            if spans[..index].iter().any(|before| before.sequence == span.sequence) {
                return Err(ModelError::Batch(format!("sequence {} gets two spans at once", span.sequence)));
            }
        }
        let (rows, most) = (spans.iter().map(|span| span.tokens.len()).sum::<usize>(), self.rows);
        if rows > most {
            return Err(ModelError::Batch(format!("{rows} tokens at once, and there is room for {most}")));
        }
        let vocabulary = self.model.config.vocab_size;
        let mut targets =
            spans.iter().flat_map(|span| span.targets.iter().map(|target| (span.tokens, target)));
        if let Some((tokens, (at, token))) =
            targets.find(|(tokens, (at, token))| *at >= tokens.len() || *token as usize >= vocabulary)
        {
            return Err(ModelError::Batch(format!(
                "token {token} at {at} is no target of a span of {} tokens and a vocabulary of {vocabulary}",
                tokens.len()
            )));
        }
        if rows == 0 {
            return Ok(Vec::new());
        }
        // Spans of equal length attend together.
        let mut order: Vec<usize> = (0..spans.len()).collect();
        order.sort_by_key(|index| spans[*index].tokens.len());
        let by_length = order.chunk_by(|a, b| spans[*a].tokens.len() == spans[*b].tokens.len());
        let groups: Vec<Group> =
            by_length.map(|same| Group { spans: same.len(), length: spans[same[0]].tokens.len() }).collect();
        let mut tokens = Vec::with_capacity(rows);
        let mut first_rows = vec![0; spans.len()];
        for index in &order {
            first_rows[*index] = tokens.len();
            tokens.extend_from_slice(spans[*index].tokens);
        }
        self.advance_groups(order.iter().map(|index| spans[*index].sequence), &groups, &tokens);
        let of_span = |(span, first): (&Span<'_>, &usize)| {
            let first = *first;
            span.targets.iter().map(move |(at, token)| ((first + at) as u32, *token)).collect::<Vec<_>>()
        };
        let wanted: Vec<(u32, u32)> = spans.iter().zip(&first_rows).flat_map(of_span).collect();
        Ok(self.score_rows(&wanted))
    }

    /// Scores pairs of a row that has passed all layers, and the token that follows it.
    fn score_rows(&mut self, wanted: &[(u32, u32)]) -> Vec<Score> {
        let model = Arc::clone(&self.model);
        let (d, vocabulary) = (model.config.model_dim, model.config.vocab_size);
        let mut scores = Vec::with_capacity(wanted.len());
        for part in wanted.chunks(SCORE_ROWS.min(self.rows)) {
            let count = part.len();
            let rows = part.iter().map(|(row, _)| *row as usize + 1).max().unwrap_or(0);
            self.words.clear();
            self.words.extend(part.iter().map(|(row, _)| row));
            let targets: Vec<u32> = part.iter().map(|(_, token)| *token).collect();
            model.backend.upload(write(&mut self.words_on_device, count), &self.words);
            model.backend.upload(write(&mut self.targets, count), &targets);
            let Self {
                normed,
                branch,
                words_on_device,
                logits,
                likeliest,
                cross_entropy,
                targets: on_device,
                ..
            } = self;
            model.backend.run(|| {
                let backend = &model.backend;
                backend.gather(
                    write(branch, count * d),
                    read(normed, rows * d),
                    read(words_on_device, count),
                    d,
                );
                let len = count * vocabulary;
                backend.logits(write(logits, len), read(branch, count * d), model.head(), count);
                backend.greedy(write(likeliest, count), read(logits, len));
                backend.cross_entropy(
                    write(cross_entropy, count),
                    write(logits, len),
                    read(on_device, count),
                );
            });
            let mut nll = vec![0.0; count];
            model.backend.download(read(cross_entropy, count), &mut nll);
            model.backend.download(read(likeliest, count), &mut self.greedy[..count]);
            let likeliest = self.greedy.iter().zip(targets).map(|(likeliest, target)| *likeliest == target);
            scores.extend(nll.into_iter().zip(likeliest).map(|(nll, greedy)| Score { nll, greedy }));
        }
        scores
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
        for part in tokens.chunks(self.rows) {
            self.advance([sequence].into_iter(), part);
        }
        let rows = (tokens.len() - 1) % self.rows + 1;
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

    /// What the head made logits of when the last [`Generator::feed_each`] gave so many sequences a token: the output of the final
    /// norm, `[sequences, model_dim]`.
    pub fn states(&mut self, sequences: usize) -> Vec<f32> {
        let mut states = vec![0.0; sequences * self.model.config.model_dim];
        self.model.backend.read_activations(read(&self.normed, states.len()), &mut states);
        states
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
            model.head(),
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
        let parts = tokens.chunks(self.rows).zip(targets.chunks(self.rows));
        for ((tokens, targets), losses) in parts.zip(losses.chunks_mut(self.rows)) {
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
    fn advance(&mut self, sequences: impl ExactSizeIterator<Item = usize>, tokens: &[u32]) {
        let spans = sequences.len();
        let length = tokens.len() / spans;
        if length > 1 {
            return self.advance_groups(sequences, &[Group { spans, length }], tokens);
        }
        self.prepare(sequences, &[Group { spans, length }], tokens);
        // Passes that decode are all alike, and can be replayed.
        let model = Arc::clone(&self.model);
        let mut graph = std::mem::take(&mut self.graphs[spans - 1]);
        model.backend.replay(&mut graph, || {
            self.layers(&[Group { spans, length }]);
            self.head(0..spans);
        });
        self.graphs[spans - 1] = graph;
    }

    /// Appends tokens to some sequences, which are grouped by the number of tokens they get, and sends them through all
    /// layers; leaves the final norm's output in `normed`.
    fn advance_groups(&mut self, sequences: impl Iterator<Item = usize>, groups: &[Group], tokens: &[u32]) {
        self.prepare(sequences, groups, tokens);
        let model = Arc::clone(&self.model);
        model.backend.run(|| self.layers(groups));
    }

    /// Puts the integers of a pass on the device, and counts its tokens.
    fn prepare(&mut self, sequences: impl Iterator<Item = usize>, groups: &[Group], tokens: &[u32]) {
        let Self { words, positions, .. } = self;
        words.clear();
        words.extend(sequences.map(|sequence| sequence as u32));
        let spans = words.len();
        for span in 0..spans {
            words.push(positions[words[span] as usize] as u32);
        }
        let lengths = groups.iter().flat_map(|group| std::iter::repeat_n(group.length, group.spans));
        for (span, length) in lengths.enumerate() {
            let first = words[spans + span];
            words.extend(first..first + length as u32);
            positions[words[span] as usize] += length;
        }
        words.extend(tokens);
        self.model.backend.upload(write(&mut self.words_on_device, words.len()), words);
    }

    /// Computes the output of the final norm from the token ids of some spans.
    fn layers(&mut self, groups: &[Group]) {
        let spans: usize = groups.iter().map(|group| group.spans).sum();
        let rows: usize = groups.iter().map(|group| group.spans * group.length).sum();
        let Self { model, rope, cache, words_on_device, stream, middle, normed, packed, rotated, .. } = self;
        let Self { attended, branch, gate_up, gated, norms, .. } = self;
        let (backend, d) = (&model.backend, model.config.model_dim);
        let words = |from: usize, count: usize| View::new(&*words_on_device, from..from + count);
        let positions = || words(2 * spans, rows);
        backend.embed_weights(write(stream, rows * d), &model.embedding, words(2 * spans + rows, rows));
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
                rope.at(positions(), 1),
                heads,
            );
            let (mut span, mut row) = (0, 0);
            for Group { spans: count, length } in groups {
                let end = row + count * length;
                backend.cached_attention(
                    ViewMut::new(attended, row * query_width..end * query_width),
                    cache,
                    View::new(rotated, row * width..end * width),
                    Spans {
                        sequences: words(span, *count),
                        first: words(spans + span, *count),
                        length: *length,
                    },
                );
                (span, row) = (span + count, end);
            }
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
