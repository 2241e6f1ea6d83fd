//! All parameters of a model as one flat vector of f32 in a fixed order, and which of them training changes.
//!
//! The order is embedding, layers first to last, final norm, and the head if it is not the embedding; within a layer it is
//! that of the reference's checkpoints. The matrices of an adapter come behind all of them. Weights are in this order, in
//! memory and for reductions, so it must never change. Gradient, moments, sums, and every file of a training state have
//! one element for each *trained* parameter, in the same order: all parameters, or those of the adapter. Kernels rely on
//! one adjacency: they take `q_norm` and `k_norm` of a layer as one range.

use std::ops::Range;

use ulmus_plan::{AdaptedModule, LayerDims, ModelConfig};

use crate::error::ModelError;

/// How a tensor begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Initial {
    /// Normally distributed, with this standard deviation.
    Normal(f64),
    /// Uniformly distributed, up to this magnitude.
    Uniform(f64),
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// The L2 norms of the rows of a matrix of the base model, whose parameters these are.
    RowNorms(Range<usize>),
}

/// One named tensor of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The Hugging Face name, for instance `transformer.layers.0.attn.qkv_proj.weight`.
    pub name: String,
    /// One or two dimensions, row-major; matrices are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// Where its elements are in the flat vector.
    pub range: Range<usize>,
    /// How it begins.
    pub initial: Initial,
}

impl Tensor {
    /// Whether weight decay applies. It does to every tensor with two dimensions, the embedding included.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// Names, shapes and places of tensors in a flat vector.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layout {
    tensors: Vec<Tensor>,
    len: usize,
}

impl Layout {
    /// The layout of all parameters of a model of this shape.
    pub fn new(config: &ModelConfig) -> Self {
        Places::new(config, &[]).0
    }

    fn push(&mut self, name: String, shape: &[usize], initial: Initial) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.tensors.push(Tensor { name, shape: shape.to_vec(), range: range.clone(), initial });
        range
    }

    /// The layout of the tensors in a range of this one, as a vector of their own.
    fn part(&self, range: &Range<usize>) -> Self {
        let within = |tensor: &&Tensor| range.start <= tensor.range.start && tensor.range.end <= range.end;
        let moved = |tensor: &Tensor| Tensor {
            range: tensor.range.start - range.start..tensor.range.end - range.start,
            ..tensor.clone()
        };
        Self { tensors: self.tensors.iter().filter(within).map(moved).collect(), len: range.len() }
    }

    /// The same places under other names and with other shapes of as many elements.
    pub(crate) fn described(&self, describe: impl Fn(&Tensor) -> (String, Vec<usize>)) -> Self {
        let tensor = |tensor: &Tensor| {
            let (name, shape) = describe(tensor);
            Tensor { name, shape, ..tensor.clone() }
        };
        Self { tensors: self.tensors.iter().map(tensor).collect(), len: self.len }
    }

    /// All tensors in order; their ranges lie end to end.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.len
    }

    /// Refuses a flat vector that does not have one element per parameter.
    pub(crate) fn check_len(&self, values: &[f32]) -> Result<(), ModelError> {
        check_len(values, self.len)
    }
}

/// Refuses a flat vector that does not have one element for each of `parameters` parameters.
pub(crate) fn check_len(values: &[f32], parameters: usize) -> Result<(), ModelError> {
    if values.len() == parameters {
        Ok(())
    } else {
        Err(ModelError::Tensors(format!("{} values for {parameters} parameters", values.len())))
    }
}

/// The places of a matrix and of its adapter, if it has one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LinearPlaces {
    pub weight: Range<usize>,
    pub inputs: usize,
    pub outputs: usize,
    pub adapter: Option<AdapterPlaces>,
}

/// The places of an adapter's tensors.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AdapterPlaces {
    /// `[rank, inputs]`; of an embedding `[vocabulary, rank]`.
    pub a: Range<usize>,
    /// `[outputs, rank]`.
    pub b: Range<usize>,
    /// `[outputs]`.
    pub magnitude: Option<Range<usize>>,
    pub rank: usize,
    /// The factor of the product of both matrices.
    pub scale: f32,
    /// Number of the adapter among those of the model.
    pub number: u64,
}

impl AdapterPlaces {
    /// All of its parameters, which lie end to end.
    fn all(&self) -> Range<usize> {
        self.a.start..self.magnitude.as_ref().unwrap_or(&self.b).end
    }
}

/// The places of one layer's parameters.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerPlaces {
    pub dims: LayerDims,
    pub qkv: LinearPlaces,
    /// `q_norm`, then `k_norm`: `2 · head_dim` elements.
    pub qk_norm: Range<usize>,
    pub out_proj: LinearPlaces,
    pub proj_1: LinearPlaces,
    pub proj_2: LinearPlaces,
    pub ffn_norm: Range<usize>,
    pub attn_norm: Range<usize>,
}

/// The matrices of a layer, in the order in which a row passes them.
pub(crate) const LINEARS: usize = 4;

impl LayerPlaces {
    /// The matrices, in the order in which a row passes them.
    pub(crate) fn linears(&self) -> [&LinearPlaces; LINEARS] {
        [&self.qkv, &self.out_proj, &self.proj_1, &self.proj_2]
    }
}

/// The places of all parameters of one model.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Places {
    /// `[vocab_size, model_dim]`
    pub embedding: Range<usize>,
    pub embedding_adapter: Option<AdapterPlaces>,
    pub layers: Vec<LayerPlaces>,
    pub final_norm: Range<usize>,
    /// `[vocab_size, model_dim]`; the embedding, if both are tied.
    pub head: Range<usize>,
    /// Number of parameters without the adapter's.
    pub base: usize,
}

impl Places {
    /// The places of a model's parameters, and of those of the adapters of some of its matrices, which are in the order of
    /// the model; with the layout of all of them.
    pub(crate) fn new(config: &ModelConfig, adapted: &[AdaptedModule]) -> (Layout, Self) {
        let mut layout = Layout::default();
        let d = config.model_dim;
        // The published initialisation uses model_dim even where the fan-in is another width.
        let std = (d as f64).powf(-0.5);
        let residual_std = std * (2.0 * config.num_transformer_layers as f64).powf(-0.5);
        let table = [config.vocab_size, d];
        let embedding =
            layout.push("transformer.token_embeddings.weight".to_owned(), &table, Initial::Normal(std));
        let mut layers: Vec<LayerPlaces> = (config.layers().into_iter().enumerate())
            .map(|(i, dims)| {
                let attention = dims.q_heads * config.head_dim;
                let qkv = attention + 2 * dims.kv_heads * config.head_dim;
                let at = |name: &str| format!("transformer.layers.{i}.{name}.weight");
                let qkv = layout.push_linear(at("attn.qkv_proj"), [qkv, d], std);
                let q_norm = layout.push(at("attn.q_norm"), &[config.head_dim], Initial::Ones);
                let k_norm = layout.push(at("attn.k_norm"), &[config.head_dim], Initial::Ones);
                LayerPlaces {
                    dims,
                    qkv,
                    qk_norm: q_norm.start..k_norm.end,
                    out_proj: layout.push_linear(at("attn.out_proj"), [d, attention], residual_std),
                    proj_1: layout.push_linear(at("ffn.proj_1"), [2 * dims.ffn_dim, d], std),
                    proj_2: layout.push_linear(at("ffn.proj_2"), [d, dims.ffn_dim], residual_std),
                    ffn_norm: layout.push(at("ffn_norm"), &[d], Initial::Ones),
                    attn_norm: layout.push(at("attn_norm"), &[d], Initial::Ones),
                }
            })
            .collect();
        let final_norm = layout.push("transformer.norm.weight".to_owned(), &[d], Initial::Ones);
        let head = if config.share_input_output_layers {
            embedding.clone()
        } else {
            layout.push("lm_head.weight".to_owned(), &table, Initial::Normal(std))
        };
        let base = layout.len;
        let mut modules = adapted.iter().zip(0..).peekable();
        let mut adapt = |name: &str, weight: &Range<usize>| {
            let (module, number) = modules.next_if(|(module, _)| module.name == name)?;
            Some(layout.push_adapter(module, number, weight))
        };
        let embedding_adapter = adapt("transformer.token_embeddings", &embedding);
        for (i, layer) in layers.iter_mut().enumerate() {
            for (name, linear) in [
                ("attn.qkv_proj", &mut layer.qkv),
                ("attn.out_proj", &mut layer.out_proj),
                ("ffn.proj_1", &mut layer.proj_1),
                ("ffn.proj_2", &mut layer.proj_2),
            ] {
                linear.adapter = adapt(&format!("transformer.layers.{i}.{name}"), &linear.weight);
            }
        }
        assert!(modules.next().is_none(), "adapted modules are those of a model of this shape, in order");
        (layout, Self { embedding, embedding_adapter, layers, final_norm, head, base })
    }

    /// How deep the gradient goes if only the parameters in `trained` are trained: 0 is the embedding, and 1 + `LINEARS` · l
    /// + k the output of matrix k of layer l.
    pub(crate) fn lowest_trained(&self, trained: &Range<usize>) -> usize {
        if trained.start == 0 || self.embedding_adapter.is_some() {
            return 0;
        }
        let linears = self.layers.iter().flat_map(LayerPlaces::linears);
        1 + linears.take_while(|linear| linear.adapter.is_none()).count()
    }

    /// The first trained parameter of a layer or of one behind it, in the flat vector.
    pub(crate) fn first_trained(&self, trained: &Range<usize>, layer: usize) -> usize {
        let layers = &self.layers[layer..];
        if trained.start == 0 {
            return layers[0].qkv.weight.start;
        }
        let adapters =
            layers.iter().flat_map(LayerPlaces::linears).filter_map(|linear| linear.adapter.as_ref());
        adapters.map(|adapter| adapter.all().start).next().unwrap_or(trained.end)
    }
}

impl Layout {
    fn push_linear(&mut self, name: String, [outputs, inputs]: [usize; 2], std: f64) -> LinearPlaces {
        let weight = self.push(name, &[outputs, inputs], Initial::Normal(std));
        LinearPlaces { weight, inputs, outputs, adapter: None }
    }

    fn push_adapter(&mut self, module: &AdaptedModule, number: u64, weight: &Range<usize>) -> AdapterPlaces {
        let AdaptedModule { name, inputs, outputs, rank, .. } = module;
        let (a, b) = if module.is_embedding {
            (
                self.push(format!("{name}.lora_embedding_A"), &[*inputs, *rank], Initial::Zeros),
                self.push(format!("{name}.lora_embedding_B"), &[*outputs, *rank], Initial::Normal(1.0)),
            )
        } else {
            let bound = 1.0 / (*inputs as f64).sqrt();
            (
                self.push(format!("{name}.lora_A.weight"), &[*rank, *inputs], Initial::Uniform(bound)),
                self.push(format!("{name}.lora_B.weight"), &[*outputs, *rank], Initial::Zeros),
            )
        };
        let magnitude = module.has_magnitude.then(|| {
            let norms = Initial::RowNorms(weight.clone());
            self.push(format!("{name}.lora_magnitude_vector"), &[*outputs], norms)
        });
        AdapterPlaces { a, b, magnitude, rank: *rank, scale: module.scale as f32, number }
    }
}

/// Adjacent trained parameters that are updated in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Update {
    /// The places of their weights in the vector of all parameters.
    pub parameters: Range<usize>,
    /// The places of their gradient and moments in vectors of the trained parameters.
    pub elements: Range<usize>,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// The parameters that training changes, which lie end to end: all of a model's, or those of its adapter. They alone have
/// a gradient and moments, and are part of the training state; all others are frozen.
#[derive(Debug, Clone, PartialEq)]
pub struct Trainable {
    layout: Layout,
    parameters: Range<usize>,
    updates: Vec<Update>,
}

impl Trainable {
    /// Trains all parameters.
    pub fn all(layout: &Layout) -> Self {
        Self::of(layout, 0..layout.len)
    }

    /// Trains the tensors in a range.
    pub(crate) fn of(layout: &Layout, parameters: Range<usize>) -> Self {
        let layout = layout.part(&parameters);
        let mut updates: Vec<Update> = Vec::new();
        for tensor in layout.tensors() {
            match updates.last_mut() {
                Some(last) if last.decays == tensor.decays() => last.elements.end = tensor.range.end,
                _ => updates.push(Update {
                    parameters: 0..0,
                    elements: tensor.range.clone(),
                    decays: tensor.decays(),
                }),
            }
        }
        for Update { parameters: place, elements, .. } in &mut updates {
            *place = parameters.start + elements.start..parameters.start + elements.end;
        }
        Self { layout, parameters, updates }
    }

    /// Number of trained parameters.
    pub fn parameters(&self) -> usize {
        self.parameters.len()
    }

    /// Names, shapes and places of the trained parameters, in vectors of them alone.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Their places in the vector of all parameters.
    pub(crate) fn range(&self) -> &Range<usize> {
        &self.parameters
    }

    /// The ranges that are updated in one go each, in order.
    pub(crate) fn updates(&self) -> &[Update] {
        &self.updates
    }

    /// The place of these parameters' gradient, or `None` if they are frozen.
    pub(crate) fn place(&self, parameters: &Range<usize>) -> Option<Range<usize>> {
        let trained = &self.parameters;
        let is_trained = trained.start <= parameters.start && parameters.end <= trained.end;
        is_trained.then(|| parameters.start - trained.start..parameters.end - trained.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ulmus_plan::Preset;

    fn untied() -> ModelConfig {
        ModelConfig { share_input_output_layers: false, ..ModelConfig::default() }
    }

    fn assert_gapless(layout: &Layout) {
        let mut next = 0;
        for tensor in layout.tensors() {
            assert_eq!(tensor.range.start, next, "{}", tensor.name);
            assert_eq!(tensor.range.len(), tensor.shape.iter().product::<usize>());
            next = tensor.range.end;
        }
        assert_eq!(next, layout.parameters());
    }

    #[test]
    fn ranges_are_gapless_and_count_every_parameter() {
        for config in Preset::ALL.map(Preset::config).into_iter().chain([untied()]) {
            let layout = Layout::new(&config);
            assert_eq!(layout.parameters() as u64, config.parameters());
            assert_gapless(&layout);
            for tensor in layout.tensors() {
                assert_eq!(tensor.decays(), tensor.initial != Initial::Ones, "{}", tensor.name);
            }
        }
    }

    #[test]
    fn everything_has_its_own_place_if_all_parameters_train() {
        for config in Preset::ALL.map(Preset::config).into_iter().chain([untied()]) {
            let (layout, places) = Places::new(&config, &[]);
            let trainable = Trainable::all(&layout);
            assert_eq!((trainable.parameters(), trainable.layout()), (layout.len, &layout));
            for tensor in layout.tensors() {
                assert_eq!(trainable.place(&tensor.range), Some(tensor.range.clone()), "{}", tensor.name);
            }
            assert_eq!(places.lowest_trained(trainable.range()), 0);
            // Matrices and norms in turn, twice per layer; the embedding is updated with the first matrix, and an untied head
            // comes last.
            let updates = trainable.updates();
            assert_eq!(updates[0].parameters, 0..places.layers[0].qkv.weight.end);
            let heads = usize::from(!config.share_input_output_layers);
            assert_eq!(updates.len(), 4 * places.layers.len() + heads);
            assert!(updates.iter().all(|update| update.parameters == update.elements));
        }
    }

    #[test]
    fn q_norm_and_k_norm_are_neighbours() {
        let (layout, places) = Places::new(&ModelConfig::default(), &[]);
        for (i, layer) in places.layers.iter().enumerate() {
            let q = &layout.tensor(&format!("transformer.layers.{i}.attn.q_norm.weight")).unwrap().range;
            let k = &layout.tensor(&format!("transformer.layers.{i}.attn.k_norm.weight")).unwrap().range;
            assert_eq!(q.end, k.start);
            assert_eq!(layer.qk_norm, q.start..k.end);
        }
    }
}
